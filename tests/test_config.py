"""Recipes: what is accepted, what is refused and what the refusal says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import srpo.config
from srpo.config import dump_config, find_recipe, load_config
from srpo.errors import InputError
from srpo.objective import SRPOConfig

_SHIPPED = sorted(path.stem for path in (Path(srpo.config.__file__).parent / "recipes").glob("*.yaml"))
SECTIONS = "dancegrpo, data, direct_align, draft, model, optimizer, refl, reward, run, srpo, validation"
_MINIMAL: dict[str, dict[str, Any]] = {
    "model": {"path": "model"},
    "reward": {"path": "reward"},
    "data": {"prompts": "prompts.txt"},
}


def _write(path: Path, **sections: Any) -> Path:
    """A minimal valid recipe with `sections` merged in."""
    merged = {name: {**_MINIMAL.get(name, {}), **sections.get(name, {})} for name in {**_MINIMAL, **sections}}
    path.write_text(yaml.safe_dump(merged))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return _write(tmp_path / "small.yaml")


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_recipes_are_shipped() -> None:
    assert {"tiny", "flux-dev-hps", "flux-dev-pickscore", "flux-dev-offline"} <= set(_SHIPPED)


@pytest.mark.parametrize("name", _SHIPPED)
def test_shipped_recipe_loads_and_survives_dump_and_load(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.run.dir == f"runs/{name}"
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


@pytest.mark.parametrize(
    ("name", "preset"), [("flux-dev-hps", "hps"), ("flux-dev-offline", "hps"), ("flux-dev-pickscore", "pickscore")]
)
def test_shipped_flux_recipe_is_the_official_one(name: str, preset: str) -> None:
    assert load_config(name).srpo == SRPOConfig.preset(preset)


def test_minimal_recipe_gets_the_defaults(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.srpo == SRPOConfig()
    assert (config.model.path, config.reward.path, config.data.prompts) == ("model", "reward", "prompts.txt")
    assert (config.run.dir, config.data.mode, config.model.precision) == ("runs/small", "online", "fp32")


def test_overrides_are_yaml_and_the_last_one_wins(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "srpo.learning_rate=1e-5",
            "srpo.window=[3, 20]",
            "srpo.threshold=null",
            "srpo.updates=7",
            "srpo.updates=9",
            "srpo.positive_controls=[a=b, c]",
            "run.dir=some/where",
            "run.tensorboard=false",
            "model.precision=bf16",
        ],
    )
    assert config.srpo.learning_rate == 1e-5
    assert config.srpo.window == (3, 20)
    assert config.srpo.threshold is None
    assert config.srpo.updates == 9
    assert config.srpo.positive_controls == ("a=b", "c")
    assert (config.run.dir, config.run.tensorboard, config.model.precision) == ("some/where", False, "bf16")


def test_override_may_open_a_section(tmp_path: Path) -> None:
    recipe = tmp_path / "part.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"path": "m"}, "data": {"prompts": "p"}}))
    assert load_config(recipe, ["reward.path=there"]).reward.path == "there"


def test_preset_is_changed_by_the_recipe_s_keys_and_those_by_overrides(tmp_path: Path) -> None:
    recipe = _write(tmp_path / "r.yaml", srpo={"preset": "hps", "threshold": 0.5, "updates": 3})
    assert load_config(recipe).srpo == SRPOConfig(threshold=0.5, updates=3)

    changed = load_config(recipe, ["srpo.preset=pickscore", "srpo.updates=4"]).srpo
    pickscore = SRPOConfig.preset("pickscore")
    assert (changed.threshold, changed.updates) == (0.5, 4)
    assert (changed.window, changed.reward_divisor, changed.rollout_guidance) == (
        pickscore.window,
        pickscore.reward_divisor,
        pickscore.rollout_guidance,
    )


def test_control_group_replaces_the_control_words(recipe: Path) -> None:
    objective = load_config(recipe, ["data.control_group=bold", "srpo.positive_controls=[x]"]).srpo
    assert (objective.positive_controls, objective.negative_controls) == (("bold",), ("thin",))


@pytest.mark.parametrize(
    "data",
    [
        {"mode": "online", "prompts": "p"},
        {"mode": "offline", "images": "i", "prompts": None},
        {"mode": "mixed", "prompts": "p", "images": "i"},
    ],
)
def test_mode_with_what_it_needs(tmp_path: Path, data: dict[str, Any]) -> None:
    assert load_config(_write(tmp_path / "r.yaml", data=data)).data.mode == data["mode"]


def test_find_recipe_takes_a_path_or_a_shipped_name(recipe: Path) -> None:
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("tiny").name == "tiny.yaml"
    with pytest.raises(InputError, match=r"^recipe 'nowhere' is neither a file nor a shipped .*\(flux-dev-dancegrpo, "):
        find_recipe("nowhere")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("srpo", "learning_rat", "srpo.learning_rate"),
        ("srpo", "windw", "srpo.window"),
        ("srpo", "presett", "srpo.preset"),
        ("run", "learning_rate", "srpo.learning_rate"),
        ("model", "precison", "model.precision"),
        ("data", "prompt", "data.prompts"),
        ("reward", "typ", "reward.type"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_valid_one(
    tmp_path: Path, section: str, key: str, nearest: str
) -> None:
    recipe = _write(tmp_path / "r.yaml", **{section: {key: 1}})
    with pytest.raises(InputError, match=rf"^unknown key '{section}\.{key}': did you mean '{re.escape(nearest)}'\?$"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate': did you mean 'srpo.learning_rate'?"),
        ("micro_batc: 1", "unknown key 'micro_batc': did you mean 'run.micro_batch'?"),
        ("qqqqqqq: 1", f"unknown key 'qqqqqqq': sections are {SECTIONS}"),
        ("modle: {path: x}", "unknown key 'modle': did you mean 'model'?"),
        ("rewards: {path: x}", "unknown key 'rewards': did you mean 'reward'?"),
        ("sprpo: {updates: 1}", "unknown key 'sprpo': did you mean 'srpo'?"),
        ("1: 2", f"unknown key 1: sections are {SECTIONS}"),
    ],
)
def test_unknown_key_outside_the_sections_is_refused(recipe: Path, line: str, message: str) -> None:
    recipe.write_text(recipe.read_text() + line + "\n")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_config(recipe)


def test_every_unknown_key_is_named_at_once(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key 'srpo\.updats'.*; unknown key 'run\.sed'"):
        load_config(recipe, ["srpo.updats=1", "run.sed=2"])


@pytest.mark.parametrize(
    "override",
    [
        "srpo.updates=many",
        "srpo.updates=2.5",
        "srpo.learning_rate=fast",
        "srpo.window=5",
        "srpo.window=[5]",
        "srpo.window=[5, 25, 30]",
        "srpo.window=[a, b]",
        "srpo.positive_controls=Real",
        "srpo.threshold=[1]",
        "srpo.form=paper",
        "srpo.noise=same",
        "srpo.preset=clip",
        "srpo.preset=[hps]",
        "model.path=5",
        "model.precision=fp16",
        "model.checkpointing=perhaps",
        "model.kernels=some",
        "model.kernels=[gelu]",
        "model.kernels=[]",
        "reward.type=hps",
        "reward.path=[a]",
        "data.mode=live",
        "data.prompts=3",
        "data.control_group=nobody",
        "data.control_group=[bold]",
        "run.seed=x",
        "run.tensorboard=maybe",
    ],
)
def test_wrong_type_or_choice_is_refused_naming_the_key(recipe: Path, override: str) -> None:
    key = override.partition("=")[0]
    name = "control group" if key == "data.control_group" else key
    with pytest.raises(InputError, match=re.escape(name)):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("srpo.updates=many", "got 'many'"),
        ("srpo.learning_rate=-1", "learning_rate must be positive and finite, got -1.0"),
        ("srpo.learning_rate=.nan", "learning_rate must be positive and finite, got nan"),
        ("srpo.window=[25, 5]", "window must be 0 < a < b <= 50, got (25, 5)"),
        ("srpo.threshold=.inf", "threshold must be a finite number or null, got inf"),
        ("srpo.discount_denoise=[0.1, 2]", "discount_denoise must be two numbers in [0, 1], got (0.1, 2.0)"),
        ("srpo.discount_denoise=[0.1, .nan]", "discount_denoise must be two numbers in [0, 1], got (0.1, nan)"),
        ("srpo.positive_controls=[]", "positive_controls must be one or more non-empty words, got ()"),
        ("srpo.preset=clip", "srpo.preset must be one of ['hps', 'pickscore'], got 'clip'"),
        ("data.offline_fraction=1.5", "data.offline_fraction must be in [0, 1], got 1.5"),
        ("data.control_group=nobody", "unknown control group 'nobody'; known groups: blue, bold, narrow, realism"),
        ("run.micro_batch=0", "run.micro_batch must be at least 1, got 0"),
        ("run.keep=1", "run.keep must be at least 2, got 1"),
        ("run.save_every=0", "run.save_every must be at least 1, got 0"),
        ("run.sample_every=-1", "run.sample_every must be at least 0, got -1"),
        ("run.sample_steps=0", "run.sample_steps must be at least 1, got 0"),
        ("run.sample_count=0", "run.sample_count must be at least 1, got 0"),
        ("run.draws_per_rollout=0", "run.draws_per_rollout must be at least 1, got 0"),
        ("run.fp8_all_gather=true", "run.fp8_all_gather needs run.sharding, model.precision fp8 and no model.lora"),
        ("model.max_sequence_length=0", "max_sequence_length must be"),
    ],
)
def test_value_out_of_range_is_refused(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        ({"mode": "online", "prompts": None}, "data.prompts is needed in online mode"),
        ({"mode": "offline"}, "data.images is needed in offline mode"),
        ({"mode": "mixed"}, "data.images is needed in mixed mode"),
        ({"mode": "mixed", "prompts": None, "images": "i"}, "data.prompts is needed in mixed mode"),
    ],
)
def test_mode_without_what_it_needs_is_refused(tmp_path: Path, data: dict[str, Any], needed: str) -> None:
    with pytest.raises(InputError, match=re.escape(needed)):
        load_config(_write(tmp_path / "r.yaml", data=data))


@pytest.mark.parametrize("section", ["model", "reward", "data"])
def test_missing_section_is_refused_by_name(recipe: Path, section: str) -> None:
    values = yaml.safe_load(recipe.read_text())
    del values[section]
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=rf"\b{section}: Field required$"):
        load_config(recipe)


def test_missing_key_is_refused_by_name(recipe: Path) -> None:
    recipe.write_text("model: {precision: fp32}\nreward: {path: r}\ndata: {prompts: p}\n")
    with pytest.raises(InputError, match=r"\bmodel\.path: Field required$"):
        load_config(recipe)


@pytest.mark.parametrize("value", ["", "5", "[path]", "words"])
def test_section_without_keys_is_refused(recipe: Path, value: str) -> None:
    recipe.write_text(f"model: {value}\nreward: {{path: r}}\ndata: {{prompts: p}}\n")
    for overrides in ([], ["model.path=x"]):
        with pytest.raises(InputError, match=r"^section 'model' must hold keys, got "):
            load_config(recipe, overrides)


@pytest.mark.parametrize(
    ("text", "key"), [("model: {path: a, path: b}", "path"), ("model: {path: a}\nmodel: {path: b}", "model")]
)
def test_key_given_twice_is_refused(recipe: Path, text: str, key: str) -> None:
    recipe.write_text(f"{text}\nreward: {{path: r}}\ndata: {{prompts: p}}\n")
    with pytest.raises(
        InputError, match=rf"^recipe {re.escape(str(recipe))}: key '{key}' is given twice(\n|.)*line \d"
    ):
        load_config(recipe)


def test_yaml_anchors_and_merge_keys_work(recipe: Path) -> None:
    """Refusing duplicate keys must not refuse YAML's own way of sharing them."""
    recipe.write_text("reward: &r {path: shared}\nmodel: {<<: *r, precision: bf16}\ndata: {prompts: p}\n")
    config = load_config(recipe)
    assert (config.model.path, config.model.precision) == ("shared", "bf16")


@pytest.mark.parametrize("override", ["updates=3", "srpo.updates", "srpo.=3", ".updates=3", "=3", "", "srpo=3"])
def test_malformed_override_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(InputError, match=f"^override {re.escape(repr(override))} must look like section.key=value$"):
        load_config(recipe, [override])


def test_override_that_is_not_yaml_is_refused(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"^override 'srpo\.window=\[3, ': "):
        load_config(recipe, ["srpo.window=[3, "])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "recipe {path}: while parsing"),
        (b"- model\n", "recipe {path} must hold sections, got list"),
        (b"just words\n", "recipe {path} must hold sections, got str"),
        (b"model: \xff\xfe\n", "recipe {path}: "),
    ],
)
def test_file_that_is_no_recipe_is_refused(recipe: Path, content: bytes, message: str) -> None:
    recipe.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(path=recipe))}"):
        load_config(recipe)


def test_empty_file_is_refused_for_its_missing_sections(recipe: Path) -> None:
    recipe.write_text("")
    with pytest.raises(InputError, match=r"model: Field required; reward: Field required; data: Field required"):
        load_config(recipe)
