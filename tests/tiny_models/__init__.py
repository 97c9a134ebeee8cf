"""Real model and processor classes at tiny size with random weights: they show that the ways fit, and no figure of
them is a result.

Every builder scales its weights up until the answer depends on the picture; the processors' std differs per channel.
"""

from __future__ import annotations

from tiny_models import odd, packed, tiled
from tiny_models.architecture import IMAGE_MEAN, IMAGE_STD, SIDE, Architecture
from tiny_models.llavas import llava, llava_next, llava_onevision
from tiny_models.others import gemma3, idefics3, instructblip, instructblip_t5, internvl, mllama, paligemma, smolvlm
from tiny_models.qwens import qwen2_5_vl, qwen2_vl, qwen3_vl

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llava", llava, "<image>"),
        Architecture("llava_next", llava_next, "<image>"),
        Architecture("llava_onevision", llava_onevision, "<image>", nested=True),
        Architecture("qwen2_vl", qwen2_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
        Architecture("qwen2_5_vl", qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
        Architecture("qwen3_vl", qwen3_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
        Architecture("internvl", internvl, "<IMG_CONTEXT>"),
        Architecture("gemma3", gemma3, "<start_of_image>", nested=True),
        Architecture("idefics3", idefics3, "<image>", nested=True),
        Architecture("smolvlm", smolvlm, "<image>", nested=True),
        Architecture("mllama", mllama, "<|image|>", nested=True, mixed=False),
        Architecture("paligemma", paligemma, "<image>", template="{images}{text}"),
        Architecture("instructblip", instructblip, "", several=False, mixed=False, template="{images}{text}"),
        Architecture("instructblip_t5", instructblip_t5, "", several=False, mixed=False, template="{images}{text}"),
    )
}

COVERED = ARCHITECTURES | {kind.name: kind for kind in (*packed.KINDS, *tiled.KINDS, *odd.KINDS)}
"""All that the coverage table tells of, by transformers' names of the types; the tests go deeper into the ones above."""

__all__ = ["ARCHITECTURES", "COVERED", "IMAGE_MEAN", "IMAGE_STD", "SIDE", "Architecture"]
