"""Prompts, captioned images and the order in which they are seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srpo.data import CONTROL_GROUPS, CaptionedImage, control_group, load_image, order, read_images, read_prompts
from srpo.errors import InputError

# --- prompts ---------------------------------------------------------------------------------------------------------


def _prompts(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\ntwo dogs\n", ["a cat", "two dogs"]),
        (b"a cat\ntwo dogs", ["a cat", "two dogs"]),
        (b"a cat\r\ntwo dogs\r\n", ["a cat", "two dogs"]),
        (b"  a cat \t\n", ["a cat"]),
        (b"\xef\xbb\xbfa cat\ntwo dogs\n", ["a cat", "two dogs"]),
        ("café\nein Bär\n猫\n".encode(), ["café", "ein Bär", "猫"]),
        ("one\u2028line\n".encode(), ["one\u2028line"]),
    ],
    ids=["lines", "no-last-newline", "windows", "spaces", "bom", "utf-8", "unicode-line-separator"],
)
def test_prompts_are_read_one_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    assert read_prompts(_prompts(tmp_path, content)) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompt file {path} is empty"),
        (b"\n \n\t\n", "prompt file {path} is empty"),
        (b"\xef\xbb\xbf", "prompt file {path} is empty"),
        (b"a\n\nb\n", "prompt file {path}: no prompt on line 2"),
        (b"\na\n  \nb\n\n", "prompt file {path}: no prompt on lines 1, 3, 5"),
        (
            b"a\n" + b"\n" * 12 + b"b\n",
            "prompt file {path}: no prompt on lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more",
        ),
        (b"a\ncaf\xe9\nb\n", "prompt file {path} is not UTF-8 on line 2"),
        (b"\xff\na\n\xfe\n", "prompt file {path} is not UTF-8 on lines 1, 3"),
    ],
    ids=["empty", "only-blank", "only-bom", "one-blank", "blanks", "many-blanks", "latin-1", "bytes"],
)
def test_unusable_prompts_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = _prompts(tmp_path, content)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(path=path))}$"):
        read_prompts(path)


def test_missing_prompt_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    with pytest.raises(InputError, match=f"^prompt file {re.escape(str(path))} cannot be read: No such file"):
        read_prompts(path)
    with pytest.raises(InputError, match=f"^prompt file {re.escape(str(tmp_path))} cannot be read: Is a directory"):
        read_prompts(tmp_path)


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
    assert read_images(folder) == [
        CaptionedImage(folder / "a.png", "first"),
        CaptionedImage(folder / "b.jpg", "zweites Bär"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "",
        '"a.png"',
        "[1, 2]",
        "null",
        '{"file_name": "a.png"}',
        '{"text": "words"}',
        '{"file_name": 5, "text": "words"}',
        '{"file_name": null, "text": "words"}',
        '{"file_name": "a.png", "text": null}',
        '{"file_name": "a.png", "text": {"en": "words"}}',
    ],
)
def test_bad_line_of_the_list_is_refused_by_number(folder: Path, line: str) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + line + "\n" + '{"file_name": "a.png", "text": "last"}\n')
    message = f'{metadata}: line 3 must be {{"file_name": ..., "text": ...}}'
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_images(folder)


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_caption_is_refused_by_line(folder: Path, text: str) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(json.dumps({"file_name": "a.png", "text": text}) + "\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(metadata))}: line 1 has an empty text$"):
        read_images(folder)


def _refused_picture(folder: Path, name: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "words"}) + "\n")
    message = f"{folder / 'metadata.jsonl'}: line 1: {folder / name} cannot be read as an image ("
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_images(folder)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_truncated_picture_is_refused_before_training(folder: Path, name: str, kept: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * kept)])
    _refused_picture(folder, name)


def test_damaged_picture_is_refused(folder: Path) -> None:
    content = bytearray((folder / "a.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "a.png").write_bytes(content)
    _refused_picture(folder, "a.png")


def test_missing_or_other_file_is_refused(folder: Path) -> None:
    _refused_picture(folder, "missing.png")
    _refused_picture(folder, "metadata.jsonl")


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


# --- order and control words -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bold", (("bold",), ("thin",))),
        ("thin", (("thin",), ("bold",))),
        ("blue", (("blue",), ("red",))),
        (
            "realism",
            (
                ("Natural-lighting", "Detail", "Detailed", "Real"),
                ("Concept art", "Painting", "Anime", "Flat", "Oil"),
            ),
        ),
    ],
)
def test_control_groups_hold_their_words(name: str, words: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    assert control_group(name) == words


def test_unknown_control_group_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=f"^unknown control group 'x'; known groups: {', '.join(sorted(CONTROL_GROUPS))}$"
    ):
        control_group("x")
