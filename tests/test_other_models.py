"""Beyond LLaVA: packed patches through lmms-eval's own Qwen2-VL wrapper, and every wrapper that can be imported here.

The Qwen2-VL is of tiny size with random weights: it shows that the ways fit, and no figure of it is a result.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lmms_smoothguard.inputs.layouts import PackedPatches
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource
from lmms_smoothguard.tiny.model import build_processor

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Directory, model and processor."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_processor().tokenizer
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    start, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(names)
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**patches, min_pixels=56 * 56, max_pixels=112 * 112),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template=_TEMPLATE,
    )
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "eos_token_id": end, "bos_token_id": start, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=vision_start, vision_end_token_id=vision_end,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that random weights notice the picture
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, tokenizer.pad_token_id
    directory = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory, model, processor


def ask(processor, pictures, text="What is it?"):
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt, pictures


@pytest.mark.parametrize("shape", ["one image", "two images", "a batch of unequal sizes"])
def test_packed_copies_answer_as_separate_calls(qwen, images, shape):
    _, model, processor = qwen
    wide = images[2].resize((112, 56))
    rows = {
        "one image": [ask(processor, [images[0]])],
        "two images": [ask(processor, [images[0], wide])],
        "a batch of unequal sizes": [
            ask(processor, [images[0]]),
            ask(processor, [wide, images[1]], "Describe the image."),
        ],
    }[shape]
    inputs = processor(
        images=[picture for _, pictures in rows for picture in pictures],
        text=[prompt for prompt, _ in rows],
        padding=True,
        return_tensors="pt",
    )
    found = find_images(inputs, model.config)
    assert isinstance(found.layout, PackedPatches)
    config = {"sigma": 1.0, "num_samples": 5}
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, smoothguard=config, return_dict_in_generate=True)
    source = NoiseSource(found, sigma=1.0, statistics=None, seed=0)
    answers = set()
    for number in range(5):
        pixels = found.values if number == 0 else source.copy(number)
        plain = model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=6, do_sample=False)
        for row, verdict in enumerate(out.smoothguard):
            answer = plain[row, inputs["input_ids"].shape[1] :].tolist()
            assert list(verdict.candidates[number]) == answer[: len(verdict.candidates[number])]
            answers.add(tuple(answer))
    assert len(answers) > 1  # or nothing was tested


def test_pixel_noise_reaches_the_patches_at_its_scale(qwen):
    _, model, processor = qwen
    prompt, pictures = ask(processor, [Image.new("RGB", (112, 112), (128, 128, 128))])
    inputs = processor(images=pictures, text=prompt, return_tensors="pt")
    found = find_images(inputs, model.config)
    statistics = pixel_statistics(model, processor.image_processor)
    noisy = NoiseSource(found, sigma=0.05, statistics=statistics, seed=0).copy(1)
    offset = (noisy - found.values).view(-1, 3, 2, 14 * 14)
    assert torch.equal(offset[:, :, 0], offset[:, :, 1])
    assert torch.allclose(offset.std(dim=(0, 2, 3)) * statistics.std, torch.full((3,), 0.05), rtol=0.05)


def test_attack_and_defence_through_lmms_evals_qwen2_vl_wrapper(qwen):
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    directory, _, _ = qwen
    found = simple_evaluate(
        model="smoothguard_qwen2_vl",
        model_args=f"pretrained={directory},sigma=0.5,noise_space=pixel,num_samples=3,attack_steps=2,min_pixels=3136,max_pixels=12544",
        tasks=["shapes_pope_pgd"], limit=2, batch_size=1, bootstrap_iters=0,
        task_manager=TaskManager("ERROR", model_name="smoothguard_qwen2_vl"),
    )  # fmt: skip
    for sample in found["samples"]["shapes_pope_pgd"]:
        info = sample["token_counts"][0]
        assert 0.03 < info["attack_rendering_gap"] < 0.15  # upstream's simple wrapper sends images through JPEG
        assert 0 < info["attack_linf"] <= 4 / 255 + 1e-6
        assert len(info["candidates"]) == 3


def test_every_wrapper_that_upstream_can_import_is_made(capsys):
    """Where ours cannot be made, upstream's own import fails for the same reason: a media library is not installed."""
    models = pytest.importorskip("lmms_eval.models")
    from lmms_smoothguard.harness.lmms_eval.bases import BASES
    from lmms_smoothguard.harness.lmms_eval.wrappers import SmoothGuardMixin

    made = 0
    for base in BASES:
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
            assert issubclass(ours, upstream)
            made += 1
    assert made >= 25
