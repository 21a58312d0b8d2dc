"""Captioned images, their latents on disk, and the order in which data is seen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srpo.data import BadImageError, CaptionedImage, load_image, order, read_images
from srpo.errors import InputError
from srpo.latent_cache import LatentCache
from srpo.prompts import Prompt

# --- images ----------------------------------------------------------------------------------------------------------


def _picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good pictures and their list."""
    for name in ("a.png", "b.jpg"):
        _picture(60, 90).save(tmp_path / name)
    records = [{"file_name": "a.png", "text": " first "}, {"file_name": "b.jpg", "text": "zweites Bär"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
    return tmp_path


def test_images_are_read_with_their_captions(folder: Path) -> None:
    images = read_images(folder)
    assert images.images == [
        CaptionedImage(folder / "a.png", Prompt("first"), 1),
        CaptionedImage(folder / "b.jpg", Prompt("zweites Bär"), 2),
    ]
    assert images.images[0].digest == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    assert (images.bad, images.report.count) == ({}, 2)


def test_images_are_read_from_a_list_of_any_name_with_control_words(folder: Path) -> None:
    (folder / "lists").mkdir()
    records = [
        {"image": "../a.png", "prompt": "x", "positive": "Real", "negative": ["Oil", "Flat"], "camera": "old"},
        {"image": "../b.jpg", "caption": "y", "control_group": "bold", "weight": 3, "height": 60},
    ]
    listing = folder / "lists/photos.jsonl"
    listing.write_text("\n".join(map(json.dumps, records)))
    images = read_images(listing, (60, 90))
    assert [image.prompt for image in images.images] == [
        Prompt("x", ("Real",), ("Oil", "Flat")),
        Prompt("y", ("bold",), ("thin",), 3.0),
    ]
    assert [image.path.resolve() for image in images.images] == [folder / "a.png", folder / "b.jpg"]
    assert images.report.ignored == {"camera": 1, "height": 1}


_SHAPE = 'must be {"file_name": ..., "text": ...}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", _SHAPE),
        ("", _SHAPE),
        ('"a.png"', _SHAPE),
        ("[1, 2]", _SHAPE),
        ("null", _SHAPE),
        ('{"text": "words"}', _SHAPE),
        ('{"file_name": 5, "text": "words"}', _SHAPE),
        ('{"file_name": null, "text": "words"}', _SHAPE),
        ('{"file_name": "a.png"}', "has no prompt or text or caption"),
        ('{"file_name": "a.png", "text": null}', "must hold text in 'text', got None"),
        ('{"file_name": "a.png", "text": " "}', "has an empty text"),
        (
            '{"file_name": "a.png", "text": "x", "postive": "y"}',
            "has the unknown key 'postive'; did you mean 'positive'?",
        ),
        ('{"file_name": "a.png", "text": "x", "weight": 0}', "weight must be positive and finite, got 0"),
    ],
)
def test_bad_line_of_the_list_is_refused_by_number(folder: Path, line: str, message: str) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + line + "\n" + '{"file_name": "a.png", "text": "last"}\n')
    with pytest.raises(InputError, match=f"^{re.escape(f'image list {metadata}: line 3 {message}')}$"):
        read_images(folder, max_bad_fraction=0.9)


def _many(folder: Path, count: int) -> None:
    """`count` good pictures of different content, and their list."""
    for index in range(count):
        _picture(24, 24, index).save(folder / f"{index}.png")
    records = [{"file_name": f"{index}.png", "text": f"picture {index}"} for index in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))


def _truncate(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


_SPOILT = {
    "truncated": lambda file: _truncate(file, 0.9),
    "half": lambda file: _truncate(file, 0.5),
    "empty": lambda file: _truncate(file, 0.0),
    "damaged": _damage,
    "missing": Path.unlink,
    "text": lambda file: file.write_text("words"),
}


@pytest.mark.parametrize("how", _SPOILT)
def test_bad_picture_is_skipped_counted_and_listed(how: str, tmp_path: Path) -> None:
    _many(tmp_path, 5)
    _SPOILT[how](tmp_path / "4.png")
    found = read_images(tmp_path, max_bad_fraction=0.2)
    assert found.report.count == 4
    (listed,) = found.bad_images()
    assert listed.startswith(f"line 5: {tmp_path / '4.png'} cannot be read as an image (")
    assert [found.at(place).path.name for place in (0, 3, 4, 5)] == ["0.png", "3.png", "0.png", "0.png"]
    message = f"image list {tmp_path / 'metadata.jsonl'}: 1 of 5 images cannot be used, more than data.max_bad_fraction"
    with pytest.raises(InputError, match=f"^{re.escape(message)} 0.1 allows: line 5: "):
        read_images(tmp_path, max_bad_fraction=0.1)


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_truncated_jpeg_is_found_as_well(folder: Path, name: str) -> None:
    _truncate(folder / name, 0.9)
    assert len(read_images(folder, max_bad_fraction=0.5).bad) == 1


def test_no_good_picture_is_refused_whatever_is_allowed(folder: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="2 of 2 images cannot be used"):
        read_images(folder, max_bad_fraction=0.99)


def test_small_picture_is_bad_however_it_is_turned(tmp_path: Path) -> None:
    _many(tmp_path, 3)
    _picture(30, 20).save(tmp_path / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    _picture(30, 20).save(tmp_path / "2.png", exif=exif)
    upright = read_images(tmp_path, (24, 20), max_bad_fraction=0.5)
    assert upright.bad_images() == [
        f"line 3: {tmp_path / '2.png'} is too small: 30 x 20 for 20 x 24 (data.max_upscale 1.0)"
    ]
    assert read_images(tmp_path, (24, 20), max_upscale=1.2).bad == {}
    assert read_images(tmp_path, None).bad == {}


def test_picture_that_turns_bad_later_gives_its_place_to_the_same_one(tmp_path: Path) -> None:
    """What a running job does is what a resumed one finds."""
    _many(tmp_path, 10)
    running = read_images(tmp_path, max_bad_fraction=0.2)
    (tmp_path / "6.png").unlink()
    with pytest.raises(BadImageError, match="cannot be read as an image"):
        running.images[6].pixels((24, 24))
    running.reject(running.images[6], "gone")
    resumed = read_images(tmp_path, max_bad_fraction=0.2)
    assert [running.at(place) for place in range(10)] == [resumed.at(place) for place in range(10)]
    _picture(24, 24, 99).save(tmp_path / "7.png")
    with pytest.raises(BadImageError, match="has changed since the run started"):
        running.images[7].pixels((24, 24))
    running.reject(running.images[7], "changed")
    with pytest.raises(InputError, match="3 of 10 images"):
        running.reject(running.images[8], "gone")


def test_known_picture_is_not_decoded_again(folder: Path) -> None:
    _truncate(folder / "b.jpg", 0.9)
    digest = hashlib.sha256((folder / "b.jpg").read_bytes()).hexdigest()
    assert read_images(folder, known=lambda image: image == digest).bad == {}


def test_missing_folder_or_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^image folder {re.escape(str(tmp_path / 'none'))} does not exist$"):
        read_images(tmp_path / "none")
    with pytest.raises(InputError, match=r"^image list .*metadata\.jsonl cannot be read: No such file"):
        read_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match=r"^image list .*metadata\.jsonl is empty$"):
        read_images(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("source", [(20, 30), (30, 20), (7, 9), (200, 30)])
def test_loaded_image_has_the_size_and_range_asked_for(tmp_path: Path, source: tuple[int, int], mode: str) -> None:
    path = tmp_path / "picture.png"
    _picture(*source).convert(mode).save(path)
    loaded = load_image(path, (16, 24))
    assert (loaded.dtype, tuple(loaded.shape)) == (torch.float32, (3, 16, 24))
    assert loaded.min() >= 0
    assert loaded.max() <= 1
    assert loaded.max() > loaded.min()


def test_image_of_the_right_size_is_loaded_exactly(tmp_path: Path) -> None:
    picture = _picture(16, 24)
    picture.save(tmp_path / "picture.png")
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "picture.png", (16, 24)), expected)


@pytest.mark.parametrize("upright", [False, True])
def test_image_is_cropped_to_its_centre(tmp_path: Path, upright: bool) -> None:
    """Of three coloured thirds, only the middle one is left."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (0, 255, 0)
    pixels[:, :16] = pixels[:, 32:] = (255, 0, 0)
    if upright:
        pixels = pixels.transpose(1, 0, 2)
    Image.fromarray(pixels).save(tmp_path / "thirds.png")
    loaded = load_image(tmp_path / "thirds.png", (16, 16))
    assert torch.equal(loaded, torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1).expand(3, 16, 16))


def test_photo_is_loaded_the_way_its_camera_was_held(tmp_path: Path) -> None:
    """A viewer turns a picture by its EXIF orientation; 6 asks for a quarter turn clockwise."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255  # stored: bright on the left; shown: bright on top
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "photo.png", exif=exif)
    loaded = load_image(tmp_path / "photo.png", (16, 16))
    assert (loaded[:, :8].mean().item(), loaded[:, 8:].mean().item()) == (1.0, 0.0)


# --- latents on disk -------------------------------------------------------------------------------------------------


def _latents(tmp_path: Path, size: tuple[int, int] = (24, 24), vae: str = "a") -> LatentCache:
    (tmp_path / vae).mkdir(exist_ok=True)
    (tmp_path / vae / "config.json").write_text(json.dumps(vae))
    return LatentCache(tmp_path / "made/here", tmp_path / vae, size=size, dtype=torch.float32, kernels="auto")


def test_latents_are_encoded_once_for_each_picture_size_and_encoder(tmp_path: Path) -> None:
    calls = []

    def encode() -> torch.Tensor:
        calls.append(1)
        return torch.full((1, 2, 3), float(len(calls)))

    for _ in range(2):
        assert _latents(tmp_path).latents("x", encode).unique().item() == 1
    assert _latents(tmp_path).holds("x")
    assert not _latents(tmp_path).holds("y")
    _latents(tmp_path).latents("y", encode)
    _latents(tmp_path, (24, 48)).latents("x", encode)
    _latents(tmp_path, vae="b").latents("x", encode)
    assert len(calls) == 4
    assert not list((tmp_path / "made/here").glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"?", lambda _: b""])
def test_damaged_latents_are_encoded_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    cache = _latents(tmp_path)
    cache.latents("x", lambda: torch.ones(1, 2, 3))
    (file,) = (tmp_path / "made/here").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert torch.equal(cache.latents("x", lambda: torch.ones(1, 2, 3)), torch.ones(1, 2, 3))
    assert file.read_bytes() == content


def test_latent_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("")
    with pytest.raises(InputError, match=r"^data\.latent_cache .* cannot be made: "):
        _latents(tmp_path)


# --- order -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(0, 5))
def test_every_pass_sees_every_item_once(count: int, seed: int, epoch: int) -> None:
    seen = order(count, range(epoch * count, (epoch + 1) * count), seed)
    assert sorted(seen) == list(range(count))


def test_passes_and_seeds_differ() -> None:
    def one_pass(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(order(50, range(50 * epoch, 50 * epoch + 50), seed))

    assert len({one_pass(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert one_pass(0, 0) != tuple(range(50))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**31), st.lists(st.integers(0, 200), max_size=20))
def test_item_at_a_position_does_not_depend_on_the_others_asked_for(
    count: int, seed: int, positions: list[int]
) -> None:
    state = torch.get_rng_state()
    assert order(count, positions, seed) == [order(count, [position], seed)[0] for position in positions]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 3.0, 10.0]), min_size=1, max_size=20), st.integers(0, 2**31))
def test_a_pass_holds_each_item_as_often_as_its_share_rounded(weights: list[float], seed: int) -> None:
    count = len(weights)
    seen = order(count, range(count), seed, tuple(weights))
    for item, weight in enumerate(weights):
        share = count * weight / sum(weights)
        assert abs(seen.count(item) - share) < 1 + 1e-9
    assert seen == [order(count, [place], seed, tuple(weights))[0] for place in range(count)]


def test_weights_are_right_on_average_and_equal_ones_change_nothing() -> None:
    seen = order(3, range(3000), 0, (1.0, 2.0, 5.0))
    assert [seen.count(item) / 3000 for item in range(3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)
    assert order(9, range(30), 4, (2.0,) * 9) == order(9, range(30), 4)
