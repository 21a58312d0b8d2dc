"""Prompt embeddings on disk: written once, checked when read, computed again when damaged; training that reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command, environment, quick_config, state_of

import srpo.text_encoders
from srpo.assets import resolve_asset
from srpo.cli import main
from srpo.config import load_config
from srpo.distributed import Ranks
from srpo.embed import embed_prompts
from srpo.embeddings import EmbeddingCache
from srpo.errors import InputError
from srpo.models import Flux
from srpo.runlog import read_log
from srpo.text_encoders import CachedTexts
from srpo.tiny.digits import export_images
from srpo.trainer import Trainer

_TINY = resolve_asset("tiny", "pipeline")
_PROMPTS = ["digit one", "digit two", "bold. digit three"]


def _texts(directory: Path, model: Path = _TINY, **changes: Any) -> CachedTexts:
    options = {"device": "cpu", "dtype": torch.float32, "max_sequence_length": 16, **changes}
    return CachedTexts(directory, model, **options)


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/shard-*.safetensors"))


@pytest.fixture
def no_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load a text encoder fails."""

    def forbidden(_self: CachedTexts, prompt: str) -> None:
        raise AssertionError(f"text encoders loaded for {prompt!r}")

    monkeypatch.setattr(srpo.text_encoders.CachedTexts, "_load", forbidden)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embeddings_are_the_pipeline_s_bit_for_bit(precision: Any, tmp_path: Path) -> None:
    plain = Flux.load(_TINY, precision=precision, max_sequence_length=16)
    cached = Flux.load(_TINY, precision=precision, max_sequence_length=16, text_cache=tmp_path / "made/here")
    assert cached.pipeline.text_encoder is None
    assert cached.pipeline.text_encoder_2 is None
    expected = plain.encode_prompts(_PROMPTS)
    cached.encode_prompts(_PROMPTS)
    again = Flux.load(_TINY, precision=precision, max_sequence_length=16, text_cache=tmp_path / "made/here")
    for flux in (cached, again):
        found = flux.encode_prompts(_PROMPTS)
        assert found.prompt_embeds.dtype == expected.prompt_embeds.dtype
        assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
        assert torch.equal(found.pooled, expected.pooled)
    assert cached.texts is not None
    assert again.texts is not None
    assert cached.texts.loaded
    assert not again.texts.loaded


def test_all_that_an_embedding_depends_on_is_in_its_address(flux_shaped: Path, tmp_path: Path) -> None:
    def directory(model: Path = _TINY, length: int = 16, dtype: torch.dtype = torch.float32) -> Path:
        return EmbeddingCache(tmp_path / "cache", model, max_sequence_length=length, dtype=dtype).directory

    copy = tmp_path / "copy"
    shutil.copytree(_TINY, copy)
    assert directory(copy) == directory()
    seen = {directory(), directory(length=12), directory(dtype=torch.bfloat16), directory(flux_shaped)}
    for file in ("text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/tokenizer_config.json"):
        (copy / file).write_text((copy / file).read_text() + " ")
        seen.add(directory(copy))
    assert len(seen) == 7
    identity = json.loads((directory() / "identity.json").read_text())
    assert (identity["max_sequence_length"], identity["dtype"]) == (16, "torch.float32")


@pytest.mark.usefixtures("no_encoders")
def test_shards_hold_what_was_put_and_nothing_else(tmp_path: Path) -> None:
    def entry(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, 4, 3), value), torch.full((1, 2), value)

    texts = _texts(tmp_path)
    texts.cache.put({"a": entry(1), "b": entry(2)})
    texts.cache.put({"c": entry(3)})
    texts.cache.put({"b": entry(2), "a": entry(1)})
    assert len(_shards(tmp_path)) == 2, "the same prompts make the same file"
    other = _texts(tmp_path).cache
    assert other.missing(["a", "x", "b", "c", "x"]) == ["x"]
    for prompt, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        found = other.get(prompt)
        assert found is not None
        assert [tensor.unique().tolist() for tensor in found] == [[value], [value]]
    assert other.get("x") is None
    assert not list(tmp_path.rglob("*.tmp"))


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "truncated": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "garbage": lambda _: b"garbage" * 40,
}


@pytest.mark.parametrize("how", _DAMAGE)
def test_damaged_shard_is_computed_again(how: str, tmp_path: Path) -> None:
    texts = _texts(tmp_path)
    assert texts.prepare(_PROMPTS, shard=3) == 3
    expected = texts.embed(_PROMPTS[0])
    (shard,) = _shards(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(_DAMAGE[how](content))

    # A run that reads it computes what is not sound, and no more.
    reader, computed = _texts(tmp_path), []
    encode = reader._encode
    reader._encode = lambda prompt: computed.append(prompt) or encode(prompt)  # type: ignore[func-returns-value]
    with pytest.warns(UserWarning, match="is damaged at prompt") if how == "bit" else nullcontext():
        found = [reader.embed(prompt) for prompt in _PROMPTS]
    assert len(computed) == (1 if how == "bit" else 3)
    assert all(torch.equal(*pair) for pair in zip(found[0], expected, strict=True))

    # `srpo embed`: the shard as a whole.
    for file in _shards(tmp_path):
        if file != shard:
            file.unlink()
    done = embed_prompts(_config(tmp_path, _PROMPTS), tmp_path, shard=3)
    assert (done.computed, done.damaged) == (3, 1)
    assert _shards(tmp_path) == [shard]
    assert shard.read_bytes() == content


def test_pipeline_without_encoders_reads_what_another_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, bare = tmp_path / "cache", tmp_path / "bare"
    shutil.copytree(_TINY, bare, ignore=shutil.ignore_patterns("text_encoder*"))
    with pytest.raises(InputError, match="holds embeddings of 0 pipelines that fit it"):
        _texts(cache, bare)
    expected = _texts(cache).embed(_PROMPTS[0])
    flux = Flux.load(bare, max_sequence_length=16, text_cache=cache)
    assert torch.equal(flux.encode_prompts(_PROMPTS[:1]).prompt_embeds, expected[0])
    with pytest.raises(InputError, match=r"^prompt 'digit nine' is not in text cache .* has no text_encoder and no"):
        flux.encode_prompts(["digit nine"])
    with pytest.raises(InputError, match="is incomplete: text_encoder/ is missing"):
        Flux.load(bare, max_sequence_length=16)
    with pytest.raises(InputError, match="holds embeddings of 0 pipelines that fit it"):
        _texts(cache, bare, max_sequence_length=12)
    trained = quick_config(tmp_path / "run", "srpo.updates=1", f"model.path={bare}", f"model.text_cache={cache}")
    with pytest.raises(InputError, match=r"^prompt 'digit \w+' is not in text cache"):
        Trainer(trained)
    _texts(cache).prepare([line.strip() for line in resolve_asset("tiny", "prompts.txt").read_text().splitlines()])
    monkeypatch.setattr(srpo.text_encoders.CachedTexts, "_load", None)
    Trainer(trained).fit()


def test_cache_that_cannot_be_made_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^text cache .*file cannot be made: "):
        _texts(tmp_path / "file")
    texts = _texts(tmp_path / "cache")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(texts.cache, "put", full)
    with pytest.warns(UserWarning, match="cannot be written: no space left"):
        assert texts.embed("digit one")[0].shape[:2] == (1, 16)


# --- srpo embed ------------------------------------------------------------------------------------------------------


def _config(tmp_path: Path, prompts: list[str], *overrides: str) -> Any:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return load_config("tiny", [f"data.prompts={tmp_path / 'prompts.txt'}", *overrides])


def test_embed_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, [f"digit {index}" for index in range(7)], f"model.text_cache={tmp_path / 'cache'}")
    encode, calls = CachedTexts._encode, []

    def until_killed(self: CachedTexts, prompt: str) -> Any:
        calls.append(prompt)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, prompt)

    monkeypatch.setattr(CachedTexts, "_encode", until_killed)
    with pytest.raises(KeyboardInterrupt):
        embed_prompts(config, shard=2)
    assert len(_shards(tmp_path / "cache")) == 2
    lines: list[str] = []
    done = embed_prompts(config, shard=2, report=lines.append)
    assert (done.prompts, done.computed, done.damaged) == (7, 3, 0)
    assert lines == ["2/3 prompts", "3/3 prompts"]
    assert len(calls) == 6 + 3
    assert embed_prompts(config, shard=2).computed == 0
    assert done.directory.parent == tmp_path / "cache"


def test_ranks_share_the_prompts(tmp_path: Path) -> None:
    """Simulated: each rank stops at what the one before left it."""
    prompts = [f"digit {index}" for index in range(5)]
    config, cache = _config(tmp_path, prompts), tmp_path / "cache"
    first, second = (Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1))
    for ranks in (first, second):
        object.__setattr__(ranks, "barrier", lambda: None)
    assert embed_prompts(config, cache, ranks=first).computed == 3
    assert _texts(cache).cache.missing(prompts) == prompts[1::2]
    assert embed_prompts(config, cache, ranks=second).computed == 1  # of the two that are missing now
    assert embed_prompts(config, cache).computed == 1


def test_two_processes_embed_every_prompt_once(tmp_path: Path) -> None:
    prompts = [f"digit {index}" for index in range(7)]
    config = _config(tmp_path, prompts)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "srpo", "embed", "tiny"]
    options = [f"data.prompts={config.data.prompts}", "--out", f"{tmp_path}/cache", "--shard", "2"]
    done = subprocess.run(
        [command()[0], *launch, *options], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"(\d+) computed by this process", done.stdout)) == ["3", "4"]
    assert len(_shards(tmp_path / "cache")) == 4
    plain, cached = Flux.load(_TINY, max_sequence_length=16), _texts(tmp_path / "cache")
    assert cached.cache.missing(prompts) == []
    expected = plain.encode_prompts(prompts)
    assert torch.equal(torch.cat([cached.embed(prompt)[0] for prompt in prompts]), expected.prompt_embeds)
    assert not cached.loaded


def test_embed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "tiny", "--out", f"{tmp_path}/cache"]) == 0
    assert "10/10 prompts" in (out := capsys.readouterr().out)
    assert ": 10 computed by this process" in out
    assert main(["embed", "tiny", f"model.text_cache={tmp_path}/cache"]) == 0
    assert ": 0 computed by this process" in capsys.readouterr().out
    assert main(["embed", "tiny"]) == 2
    assert "give --out, or model.text_cache" in capsys.readouterr().err


# --- training --------------------------------------------------------------------------------------------------------


def test_training_with_every_prompt_cached_never_loads_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither called, nor moved, nor in memory; and the run is bit for bit the one without a cache."""
    cached = (f"model.text_cache={tmp_path / 'cache'}", "run.sample_every=1", "run.sample_steps=1")
    Trainer(quick_config(tmp_path / "plain", "srpo.updates=2", *cached[1:])).fit()
    embed_prompts(quick_config(tmp_path / "cached", *cached))
    monkeypatch.setattr(srpo.text_encoders.CachedTexts, "_load", None)
    trainer = Trainer(quick_config(tmp_path / "cached", "srpo.updates=1", *cached))
    assert "T5EncoderModel" not in {type(part).__name__ for part in trainer.flux.pipeline.components.values()}
    trainer.fit()
    moved = f"model.text_cache={tmp_path / 'elsewhere'}"
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere")
    Trainer(quick_config(tmp_path / "cached", "srpo.updates=2", moved, *cached[1:]), resume=True).fit()
    assert state_of(tmp_path / "plain", 2) == state_of(tmp_path / "cached", 2)
    grids = [(tmp_path / run / "samples/step-000002.png").read_bytes() for run in ("plain", "cached")]
    assert grids[0] == grids[1]


def test_run_computes_what_it_needs_and_lets_go_of_the_encoders(tmp_path: Path) -> None:
    config = quick_config(tmp_path / "run", "srpo.updates=1", f"model.text_cache={tmp_path / 'cache'}")
    trainer = Trainer(config)
    assert trainer.flux.texts is not None
    assert not trainer.flux.texts.loaded
    texts = {caption.text for index in range(2) for caption in trainer.batches.chosen(0, index)[0]}
    assert trainer.flux.texts.cache.missing(sorted(texts)) == []
    calls: list[str] = []
    trainer.flux.texts._load = calls.append  # type: ignore[assignment,method-assign]
    trainer.fit()
    assert calls == []


# --- control words, images and reports of a run ----------------------------------------------------------------------


def _log(directory: Path, event: str) -> dict:
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return next(record for record in records if record["event"] == event)


def test_prompts_with_words_of_their_own_train_towards_them(tmp_path: Path) -> None:
    texts = [line.strip() for line in resolve_asset("tiny", "prompts.txt").read_text().splitlines()]
    for name, own in (("run", {}), ("own", {"control_group": "bold"}), ("other", {"positive": ["thin"]})):
        lines = [json.dumps({"prompt": text, **own}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        group = "bold" if name == "run" else "red"
        overrides = [f"data.prompts={tmp_path / name}.jsonl", f"data.control_group={group}", "srpo.updates=1"]
        Trainer(quick_config(tmp_path / name, *overrides)).fit()
    assert state_of(tmp_path / "run", 1) == state_of(tmp_path / "own", 1) != state_of(tmp_path / "other", 1)
    assert read_log(tmp_path / "own")[0]["controls"] == ["red", "blue"]
    assert read_log(tmp_path / "own")[0]["prompt_controls"] == [["bold", "thin"]]
    assert read_log(tmp_path / "other")[0]["prompt_controls"] == [["thin", "blue"]]
    assert "prompt_controls" not in read_log(tmp_path / "run")[0]


def test_schedule_resumes_where_it_was(tmp_path: Path) -> None:
    schedule = "data.control_group=[{group: bold}, {group: red, start: 2}]"
    Trainer(quick_config(tmp_path / "whole", "srpo.updates=2", schedule)).fit()
    Trainer(quick_config(tmp_path / "parts", "srpo.updates=1", schedule)).fit()
    Trainer(quick_config(tmp_path / "parts", "srpo.updates=2", schedule), resume=True).fit()
    assert state_of(tmp_path / "whole", 2) == state_of(tmp_path / "parts", 2)
    assert [record["controls"] for record in read_log(tmp_path / "parts")] == [["bold", "thin"], ["red", "blue"]]


def test_offline_run_is_the_same_with_a_latent_cache_and_lists_bad_images(tmp_path: Path) -> None:
    images = tmp_path / "digits"
    export_images(images, 12, 0)
    listed = [json.loads(line)["file_name"] for line in (images / "metadata.jsonl").read_text().splitlines()]
    (images / listed[4]).write_bytes(b"no image")
    offline = ["data.mode=offline", f"data.images={images}", "data.max_bad_fraction=0.1", "data.prompts=null"]
    cache = f"data.latent_cache={tmp_path / 'latents'}"
    for name, updates, overrides in (("plain", 2, []), ("cached", 1, [cache]), ("again", 2, [cache])):
        with pytest.warns(UserWarning, match="1 images cannot be used and are skipped: line 5: "):
            trainer = Trainer(quick_config(tmp_path / name, f"srpo.updates={updates}", *offline, *overrides))
        trainer.fit()
    with pytest.warns(UserWarning, match="cannot be used"):
        resumed = Trainer(quick_config(tmp_path / "cached", "srpo.updates=2", *offline, cache), resume=True)
    encoded: list[object] = []
    resumed.flux.encode_images = encoded.append  # type: ignore[assignment,method-assign]
    resumed.fit()
    assert encoded == [], "all latents were read"
    assert state_of(tmp_path / "plain", 2) == state_of(tmp_path / "cached", 2) == state_of(tmp_path / "again", 2)
    (line,) = (tmp_path / "again/bad_images.txt").read_text().splitlines()
    assert line.startswith(f"line 5: {images / listed[4]} cannot be read as an image (")
    assert _log(tmp_path / "again", "data")["bad_images"] == [line]
    with pytest.raises(InputError, match=r"1 of 12 images cannot be used, more than data.max_bad_fraction 0.01 allows"):
        Trainer(quick_config(tmp_path / "strict", *offline[:2]))
    assert not (tmp_path / "strict").exists()


def test_image_that_vanishes_during_a_run_gives_way_to_the_next(tmp_path: Path) -> None:
    images = tmp_path / "digits"
    export_images(images, 12, 0)
    overrides = ["data.mode=offline", f"data.images={images}", "data.max_bad_fraction=0.1", "srpo.updates=1"]
    trainer = Trainer(quick_config(tmp_path / "run", *overrides))
    victim = trainer.batches.chosen(0, 0)[1][0]
    victim.path.unlink()
    with pytest.warns(UserWarning, match="another image takes its place"):
        x0, _, captions, _ = trainer.batches.load(0, 0, lambda: None)
    with pytest.warns(UserWarning, match="cannot be used"):
        restarted = Trainer(quick_config(tmp_path / "other", *overrides))
    x0_again, _, captions_again, _ = restarted.batches.load(0, 0, lambda: None)
    assert captions == captions_again
    assert torch.equal(x0, x0_again)


def test_faults_of_prompts_are_warned_of_and_logged_before_the_first_update(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("digit one\ndigit one\n" + "digit " * 20)
    config = quick_config(tmp_path / "run", f"data.prompts={tmp_path / 'p.txt'}", "srpo.updates=1")
    with pytest.warns(UserWarning, match="p.txt: ") as warned:
        trainer = Trainer(config)
    told = " ".join(str(warning.message) for warning in warned)
    assert "duplicates: 1 (line 2)" in told
    assert "cut off after 16 T5 tokens: 1 (line 3)" in told
    trainer.fit()
    (file,) = _log(tmp_path / "run", "data")["files"]
    assert (file["count"], file["duplicate"], file["long_t5"], file["long_clip"]) == (3, 1, 1, 1)
    assert file["lines"] == {"duplicate": [2], "long_t5": [3], "long_clip": [3]}
