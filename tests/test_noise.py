from __future__ import annotations

import pytest
import torch

from lmms_smoothguard.inputs.layouts import ChannelsFirst, PackedPatches
from lmms_smoothguard.inputs.media import Images, find_images
from lmms_smoothguard.inputs.statistics import PixelStatistics, pixel_statistics
from lmms_smoothguard.inputs.tiling import tile
from lmms_smoothguard.noise import NoiseSource


def chw(values, rows=None, mask=None):
    slices = tuple(slice(i, i + 1) for i in range(len(values)))
    return Images("pixel_values", values, ChannelsFirst(mask), slices, rows)


def source(images, *, sigma=0.1, statistics=None, seed=0):
    return NoiseSource(images, sigma=sigma, statistics=statistics, seed=seed)


def test_noise_belongs_to_the_image_not_to_the_batch(unchanged_random_state):
    values = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = source(chw(values, (0, 1, 2, 3))).copy(3)
    for i in range(4):
        assert torch.equal(source(chw(values[i : i + 1], (0,))).copy(3)[0], whole[i])


def test_copies_seeds_and_repeated_images_differ():
    values = torch.rand(1, 3, 8, 8).repeat(2, 1, 1, 1)
    one_row, two_rows = source(chw(values, (0, 0))).copy(1), source(chw(values, (0, 1))).copy(1)
    assert not torch.equal(one_row[0], one_row[1])  # twice in one prompt
    assert torch.equal(two_rows[0], two_rows[1])  # a neighbour's equal image changes nothing
    assert not torch.equal(source(chw(values)).copy(1), source(chw(values)).copy(2))
    assert not torch.equal(source(chw(values)).copy(1), source(chw(values), seed=1).copy(1))


def test_without_a_seed_every_request_has_fresh_noise():
    values = torch.rand(1, 3, 8, 8)
    assert not torch.equal(source(chw(values), seed=None).copy(1), source(chw(values), seed=None).copy(1))


def test_pixel_noise_has_each_channels_scale_and_stays_in_range():
    """Defect of the official code: noise in normalised space, so sigma in pixels differs by channel."""
    statistics = PixelStatistics(torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.13, 0.5]), "test")
    grey = (0.5 - statistics.mean) / statistics.std
    values = grey.view(1, 3, 1, 1).expand(1, 3, 200, 200).contiguous()
    noisy = source(chw(values), sigma=0.05, statistics=statistics).copy(1)
    pixels = noisy * statistics.std.view(3, 1, 1) + statistics.mean.view(3, 1, 1)
    assert torch.allclose((pixels - 0.5).std(dim=(0, 2, 3)), torch.full((3,), 0.05), rtol=0.02)
    extreme = source(chw(values), sigma=2.0, statistics=statistics).copy(1)
    pixels = extreme * statistics.std.view(3, 1, 1) + statistics.mean.view(3, 1, 1)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_normalized_noise_keeps_the_contrast():
    """Defect of the official code: clipping normalised pixels to [0, 1], which zeroes most of them."""
    values = torch.randn(1, 3, 64, 64)
    noisy = source(chw(values), sigma=0.1).copy(1)
    assert (noisy - values).std() == pytest.approx(0.1, rel=0.05)
    assert noisy.min() < -1


def test_padding_tiles_and_margins_stay_untouched():
    values = torch.randn(1, 3, 3, 8, 8)
    values[0, 2] = 0  # a padding tile
    mask = torch.ones(1, 3, 8, 8, dtype=torch.bool)
    mask[0, 0, 6:] = False
    noisy = source(chw(values, mask=mask)).copy(1)
    assert torch.equal(noisy[0, 2], values[0, 2])
    assert torch.equal(noisy[0, 0, :, 6:], values[0, 0, :, 6:])
    assert not torch.equal(noisy[0, 0, :, :6], values[0, 0, :, :6])
    wider = torch.cat([values, torch.zeros(1, 2, 3, 8, 8)], dim=1)  # the same image beside one with more tiles
    wide_mask = torch.cat([mask, torch.zeros(1, 2, 8, 8, dtype=torch.bool)], dim=1)
    assert torch.equal(source(chw(wider, mask=wide_mask)).copy(1)[:, :3], noisy)


def test_a_black_picture_is_no_padding():
    assert source(chw(torch.zeros(1, 3, 8, 8))).copy(1).any()


def test_the_frames_of_a_packed_still_share_one_draw():
    channels, frames, area = 3, 2, 4
    values = torch.zeros(5, channels * frames * area)
    images = Images("pixel_values", values, PackedPatches(channels, frames, 1), (slice(0, 2), slice(2, 5)), None)
    noisy = source(images).copy(1).view(5, channels, frames, area)
    assert torch.equal(noisy[:, :, 0], noisy[:, :, 1])
    assert noisy.std() == pytest.approx(0.1, rel=0.3)
    statistics = PixelStatistics(torch.full((3,), 0.5), torch.tensor([0.1, 0.2, 0.4]), "test")
    grid = torch.zeros(4000, channels * frames * area)
    scaled = source(
        Images("pixel_values", grid, PackedPatches(3, 2, 1), (slice(0, 4000),), None), sigma=0.01, statistics=statistics
    )
    measured = scaled.copy(1).view(4000, channels, frames * area).std(dim=(0, 2))
    assert torch.allclose(measured, 0.01 / statistics.std, rtol=0.03)


def test_qwen_layout_and_rows_are_recognised():
    from types import SimpleNamespace

    vision = SimpleNamespace(patch_size=2, temporal_patch_size=2, in_channels=3, spatial_merge_size=2)
    config = SimpleNamespace(vision_config=vision, image_token_id=9, model_type="qwen2_vl")
    grid = torch.tensor([[1, 4, 4], [1, 2, 2]])
    inputs = {
        "input_ids": torch.tensor([[1, 9, 9, 9, 9], [0, 0, 1, 1, 9]]),
        "pixel_values": torch.randn(20, 3 * 2 * 4),
        "image_grid_thw": grid,
    }
    images = find_images(inputs, config)
    assert isinstance(images.layout, PackedPatches)
    assert images.slices == (slice(0, 16), slice(16, 20))
    assert images.rows == (0, 1)


def test_tiling_is_copy_major():
    first, second = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    tiled = tile(
        {
            "pixel_values": first,
            "input_ids": torch.tensor([[1, 2], [3, 4]]),
            "position_ids": torch.arange(12).view(3, 2, 2),
            "image_sizes": [(1, 1), (2, 2)],
            "eos_token_id": [7, 8],
            "max_new_tokens": 5,
        },
        [first, second],
        "pixel_values",
    )
    assert tiled["pixel_values"].flatten(1).mean(1).tolist() == [0, 0, 1, 1]
    assert tiled["input_ids"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert tiled["position_ids"].shape == (3, 4, 2)
    assert tiled["image_sizes"] == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert tiled["eos_token_id"] == [7, 8]  # a setting, not a row
    assert tiled["max_new_tokens"] == 5


def test_statistics_from_the_models_own_directory(trained):
    model, processor = trained
    assert pixel_statistics(model).std.tolist() == [0.5] * 3
    assert pixel_statistics(model, processor.image_processor).source == "processor"


def test_images_padded_to_the_largest_of_a_batch_keep_their_noise():
    """Pixtral pads height and width, and gives the sizes."""
    from types import SimpleNamespace

    config = SimpleNamespace(vision_config=SimpleNamespace(model_type="pixtral"), image_token_id=9, model_type="llava")
    small = torch.randn(1, 3, 8, 8)
    padded = torch.nn.functional.pad(small, (0, 4, 0, 8))
    together = {
        "pixel_values": torch.cat([padded, torch.randn(1, 3, 16, 12)]),
        "image_sizes": torch.tensor([[8, 8], [16, 12]]),
    }
    alone = {"pixel_values": small, "image_sizes": torch.tensor([[8, 8]])}
    noisy = source(find_images(together, config)).copy(1)
    assert torch.equal(noisy[0, :, :8, :8], source(find_images(alone, config)).copy(1)[0])
    assert not noisy[0, :, 8:].any()


def test_different_images_get_different_noise():
    """Else one fixed pattern would be added to every image of a size, which an attacker could learn."""
    values = torch.zeros(2, 3, 8, 8)
    values[1] = 0.5
    noise = source(chw(values, (0, 1))).copy(1) - values
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


def test_positions_of_a_cache_belong_to_no_row():
    inputs = {"input_ids": torch.ones(2, 4), "cache_position": torch.arange(4), "pixel_values": torch.zeros(2, 3, 4, 4)}
    tiled = tile(inputs, [inputs["pixel_values"]] * 3, "pixel_values")
    assert tiled["cache_position"].tolist() == [0, 1, 2, 3]
    assert tiled["input_ids"].shape == (6, 4)
