"""How pictures lie in tensors, by hand: orders of packed patches, padding, whose row a picture is in, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.arrangements import layout_of
from lmms_smoothguard.inputs.layouts import ChannelsFirst, PackedPatches
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import statistics_of
from lmms_smoothguard.noise import NoiseSource

ROWS, COLUMNS, PATCH, CHANNELS = 2, 3, 2, 3


def packed_by_hand(picture, frames, order):
    """(patches, values) of a (channels, height, width) picture, one value after the other."""
    patches = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            values = np.zeros((CHANNELS, frames, PATCH * PATCH))
            for channel in range(CHANNELS):
                for frame in range(frames):
                    for y in range(PATCH):
                        for x in range(PATCH):
                            values[channel, frame, y * PATCH + x] = picture[
                                channel, row * PATCH + y, column * PATCH + x
                            ]
            patches.append(values.transpose(["CTA".index(axis) for axis in order]).ravel())
    return torch.tensor(np.array(patches), dtype=torch.float32)


@pytest.mark.parametrize(("frames", "order"), [(2, "CTA"), (2, "TCA"), (2, "TAC"), (1, "CTA"), (1, "TAC")])
def test_each_channels_scale_lies_on_its_own_values(frames, order):
    """Three flat channels, and the same three numbers told by the layout."""
    numbers = torch.tensor([0.25, 0.5, 0.75])
    picture = numbers.view(3, 1, 1).expand(3, ROWS * PATCH, COLUMNS * PATCH).numpy()
    packed = packed_by_hand(picture, frames, order)
    layout = PackedPatches(CHANNELS, frames, 1, order)
    assert torch.equal(layout.per_channel(numbers, packed).expand_as(packed), packed)
    assert torch.equal(layout.per_channel(torch.tensor([0.5]), packed), torch.full(packed.shape[1:], 0.5))


@pytest.mark.parametrize("order", ["CTA", "TCA", "TAC"])
def test_the_frames_of_a_still_share_one_draw_in_every_order(order):
    """Noise packed by hand from one drawn picture: only such noise is the same in both frames of every place."""
    layout, image = PackedPatches(CHANNELS, 2, 1, order), torch.zeros(6, CHANNELS * 2 * PATCH**2)
    noise = layout.standard_noise(image, slice(0, 6), torch.Generator().manual_seed(1))
    sizes = {"C": CHANNELS, "T": 2, "A": PATCH**2}
    frames = noise.view(6, *(sizes[axis] for axis in order)).movedim(1 + order.index("T"), 1)
    assert torch.equal(frames[:, 0], frames[:, 1])
    assert len(noise.unique()) == 6 * CHANNELS * PATCH**2


def test_orders_without_frames_and_shapes_with_sides_are_the_same_patches():
    flat, sides = torch.zeros(4, CHANNELS * PATCH**2), torch.zeros(4, CHANNELS, PATCH, PATCH)
    layout = PackedPatches(CHANNELS, 1, 1, "CA")
    draws = [layout.standard_noise(image, slice(0, 4), torch.Generator().manual_seed(2)) for image in (flat, sides)]
    assert torch.equal(draws[0].view_as(sides), draws[1])
    assert layout.per_channel(torch.tensor([1.0, 2.0, 3.0]), sides)[:, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_padding_that_a_mask_tells_of_gets_no_noise_and_is_no_part_of_a_picture():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    layout, values = PackedPatches(CHANNELS, 1, 1, "AC", mask), torch.rand(2, 3, 12)
    first = layout.standard_noise(values[:1], slice(0, 1), torch.Generator().manual_seed(3))
    assert not first[0, 2].any()
    assert first[0, :2].all()
    assert layout.unpadded(values[:1], slice(0, 1))[0].shape == (2, 12)
    alone = PackedPatches(CHANNELS, 1, 1, "AC", mask[:1, :2])
    again = alone.standard_noise(values[:1, :2], slice(0, 1), torch.Generator().manual_seed(3))
    assert torch.equal(first[:, :2], again)  # however much padding its neighbours ask for
    assert (layout.tokens(slice(0, 1), 5, 2), layout.tokens(slice(1, 2), 5, 2)) == (2, 3)


# -- by the model's type -----------------------------------------------------------------------------------------------


def config(kind, **vision):
    return SimpleNamespace(model_type=kind, image_token_id=9, vision_config=SimpleNamespace(in_channels=3, **vision))


def test_patches_with_sides_are_pictures_by_their_grid_not_one_each():
    """White paper: equal patches of one picture are not pictures that look alike, and must not share a draw."""
    inputs = {"pixel_values": torch.ones(12, 3, 2, 2), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]])}
    inputs["input_ids"] = torch.tensor([[9] * 4 + [1] * 4, [9] * 8])
    for kind in ("paddleocr_vl", "kimi_k25"):
        images = find_images(inputs, config(kind, patch_size=2))
        assert [s.stop - s.start for s in images.slices] == [4, 8]
        noise = NoiseSource(images, sigma=0.1, statistics=None, seed=0).copy(1) - inputs["pixel_values"]
        assert len(noise.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize(
    ("kind", "shape", "inputs", "said"),
    [
        ("gemma4", (1, 4, 12), {}, "with their image_position_ids"),
        ("gemma4", (2, 4, 12), {"image_position_ids": torch.zeros(1, 4, 2)}, "image_position_ids"),
        ("lfm2_vl", (1, 4, 13), {"pixel_attention_mask": torch.ones(1, 4)}, "does not fit the patches"),
        ("dots3_note", (5, 12), {"image_grid_thw": torch.tensor([[1, 2, 2]])}, "image_grid_thw"),
        ("dots3_note", (4, 15), {"image_grid_thw": torch.tensor([[1, 2, 2]])}, "does not fit"),
        ("fuyu", (4, 12), {"input_ids": torch.tensor([[9, 9, 9]])}, "tokens of a row"),
        ("inkling_mm_model", (4, 2, 2, 2, 3), {}, "runs of tokens"),
    ],
)  # fmt: skip
def test_patches_that_do_not_fit_their_type_are_refused(kind, shape, inputs, said):
    with pytest.raises(UndefendableError, match=said):
        layout_of("pixel_values", torch.zeros(shape), inputs, config(kind, temporal_patch_size=2))


def test_a_strip_a_video_and_tokens_are_refused():
    pixels = {"pixel_values": torch.rand(1, 3, 14, 64)}
    with pytest.raises(UndefendableError, match="one strip of all pictures"):
        find_images({**pixels, "target_sizes": torch.tensor([[2, 2]])}, config("minicpmv4_6"))
    with pytest.raises(UndefendableError, match="is video"):
        find_images({"pixel_values": torch.rand(1, 4, 3, 8, 8)}, config("instructblipvideo"))
    with pytest.raises(UndefendableError, match="protein_input_ids is made of tokens"):
        find_images({"protein_input_ids": torch.ones(1, 4, dtype=torch.long)}, config("evolla"))


def test_a_q_former_that_reads_one_image_a_row_is_given_no_two():
    """Upstream takes BLIP-2's second picture and looks at the first alone; copies of both would slip against each other."""
    kind = config("blip-2")
    kind.num_query_tokens = 4
    inputs = {"pixel_values": torch.rand(2, 3, 8, 8), "input_ids": torch.tensor([[9] * 4 + [1]])}
    with pytest.raises(UndefendableError, match="2 images in 1 rows"):
        find_images(inputs, kind)


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        ([[9] * 4 + [1] * 2, [1, 9, 9, 9, 9, 1]], (0, 1)),  # as many tokens as merged patches
        (
            [[9] * 6 + [1] * 3, [1] + [9] * 6 + [1, 1]],
            (0, 1),
        ),  # with tokens for ends of lines: more than patches in each row
        ([[9] * 6 + [1] + [9] * 6], (0, 0)),
        ([[9] * 12], None),  # one stretch, and two pictures
    ],
)
def test_a_pictures_row_is_where_its_tokens_are(ids, rows):
    """Two pictures of four merged patches each. With twelve tokens in all a count of patches would put both into row 0."""
    inputs = {
        "pixel_values": torch.rand(32, 3 * 2 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "input_ids": torch.tensor(ids),
    }  # fmt: skip
    found = find_images(inputs, config("hunyuan_vl", patch_size=2, temporal_patch_size=2, spatial_merge_size=2))
    assert found.rows == rows


def test_a_mask_of_whole_tiles_is_no_mask_of_margins():
    """Granite Docling's: filler tiles are all zero."""
    values = torch.rand(1, 3, 3, 4, 4)
    values[0, 2] = 0
    inputs = {"pixel_values": values, "pixel_attention_mask": torch.tensor([[True, True, False]])}
    layout, (where,) = layout_of("pixel_values", values, inputs, config("granite_docling"))
    assert isinstance(layout, ChannelsFirst)
    noise = layout.standard_noise(values, where, torch.Generator().manual_seed(0))
    assert noise[0, :2].all()
    assert not noise[0, 2].any()


def test_pixels_under_two_names_are_refused():
    """Only one of them would be defended."""
    inputs = {"pixel_values": torch.rand(1, 3, 8, 8), "pixel_values_images": torch.rand(1, 3, 8, 8)}
    with pytest.raises(UndefendableError, match="pixel_values and pixel_values_images; expected one"):
        find_images(inputs, config("video_llava"))


@pytest.mark.parametrize("key", ["pixel_values_images", "image_pixel_values"])
def test_other_names_of_pixels(key):
    images = find_images({key: torch.rand(2, 3, 8, 8), "input_ids": torch.tensor([[9], [9]])}, config("video_llava"))
    assert (images.key, images.rows) == (key, (0, 1))


@pytest.mark.parametrize(
    ("factor", "normalises"), [(1 / 255, True), (0.0078, True), (0.0078, False), (1 / 127.5, False)]
)
def test_statistics_are_of_pixels_from_0_to_1_whatever_they_are_multiplied_by(factor, normalises):
    processor = SimpleNamespace(
        do_rescale=True, rescale_factor=factor, do_normalize=normalises, image_mean=[1.0, 1.0, 1.0], image_std=[0.5] * 3
    )
    level = 100
    made = level * factor
    if normalises:
        made = (made - 1.0) / 0.5
    mean, std, _ = statistics_of(processor, "test")
    assert torch.allclose((level / 255 - mean) / std, torch.tensor(made), atol=1e-5)


# -- what the override does not reach ----------------------------------------------------------------------------------


def test_a_generate_that_is_not_transformers_own_is_refused_not_passed():
    """As DiffusionGemma's, whose mixin is another: loaded before or after, asked, configured or forced."""
    from transformers import LlamaConfig
    from transformers.modeling_utils import PreTrainedModel

    import hf_integration

    class Mixin:
        def generate(self, input_ids=None, generation_config=None, **kwargs):
            return ("answered", kwargs)

    class Apart(Mixin, PreTrainedModel):
        config_class = LlamaConfig

    model = Apart(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16))
    assert model.generate(top_k=3) == ("answered", {"top_k": 3})
    assert model.generate(smoothguard=False) == ("answered", {})
    with pytest.raises(UndefendableError, match="Apart generates in a way of its own"):
        model.generate(smoothguard=True)
    with pytest.raises(UndefendableError):
        model.generate(generation_config=SimpleNamespace(smoothguard={"sigma": 0.1}))
    hf_integration.force({"sigma": 0.1})
    try:
        with pytest.raises(UndefendableError):
            model.generate(smoothguard=False)
    finally:
        hf_integration.force(None)
    hf_integration.disable()
    try:
        assert model.generate(smoothguard=True) == ("answered", {"smoothguard": True})
    finally:
        hf_integration.enable()
    with pytest.raises(UndefendableError):
        model.generate(smoothguard=True)


def test_a_mixins_generate_before_transformers_own_is_defended():
    """Neither the class's nor GenerationMixin's, but it answers for the class."""
    from transformers import GenerationMixin, LlamaConfig
    from transformers.modeling_utils import PreTrainedModel

    class Mixin:
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    class Both(Mixin, PreTrainedModel, GenerationMixin):
        config_class = LlamaConfig
        main_input_name = "input_ids"

    model = Both(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16))
    with pytest.raises(UndefendableError, match="input_features came without the clips"):
        model.generate(
            input_ids=torch.ones(1, 2, dtype=torch.long), input_features=torch.rand(1, 4, 4), smoothguard=True
        )
