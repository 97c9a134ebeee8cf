"""lmms-eval's wrappers that can be defended, and how: inside of a Hugging Face model, or around a model that is out of reach."""

from __future__ import annotations

PREFIX = "smoothguard_"
ALIASES = {"llava_hf": ("smoothguard_llava",)}

BASES: tuple[str, ...] = (
    "aero", "aria", "audio_flamingo_3", "baichuan_omni", "cogvlm2", "fuyu", "gemma3", "gemma4", "glm4v", "huggingface",
    "idefics2", "illume_plus", "instructblip", "internvl_hf", "lfm2_5_vl", "llama4_scout", "llama_vision", "llava_hf",
    "llava_onevision1_5", "llava_onevision2", "mantis", "mistral3_vl", "mplug_owl_video", "omnivinci", "penguinvl",
    "phi3v", "phi4_multimodal", "qwen2_5_omni", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_omni",
    "qwen3_vl", "qwen_image_edit", "thyme", "uni_moe_2_omni", "video_llava", "video_salmonn_2", "videollama3", "whisper",
)  # fmt: skip
"""Those that answer through a Hugging Face model's `generate(**inputs)`."""

BLACK_BOXES = (
    "async_openai", "claude", "gemini", "gpt4v", "litellm", "llava_sglang", "openai", "qwen_vl_api", "reka", "sglang",
    "vllm", "vllm_generate",
)  # fmt: skip
"""Those of hosted models and of engines: a request becomes N requests."""


def base_of(model_name: str | None) -> str | None:
    """The upstream name behind one of ours, whose prompts and generation settings stay in force; others unchanged."""
    if not isinstance(model_name, str) or not model_name.startswith(PREFIX):
        return model_name
    for base, aliases in ALIASES.items():
        if model_name in aliases:
            return base
    return model_name.removeprefix(PREFIX)
