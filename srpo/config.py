"""Recipes: YAML plus dotted overrides, checked against typed dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from srpo.baselines.config import (
    ALGORITHMS,
    BASELINES,
    AlgorithmName,
    BaselineConfig,
    DanceGRPOConfig,
    DirectAlignConfig,
    DRaFTConfig,
    ReFLConfig,
)
from srpo.controls import ControlGroup, ControlPhase, control_group, nearest, parse_groups, parse_schedule
from srpo.errors import InputError
from srpo.loggers import WandbConfig
from srpo.lora import LoraConfig
from srpo.monitors.config import ValidationConfig, check_validation
from srpo.objective import SRPOConfig
from srpo.optimizer import OptimizerConfig
from srpo.precision import Precision
from srpo.rewards import RewardConfig, check_reward
from srpo.sampling import Solver
from srpo_kernels.patching import PATCHABLE

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "TrainConfig", "dump_config", "find_recipe", "load_config"]

#: YAML reads a bare ``off`` as false.
Kernels = Annotated[
    Literal["auto", "off"] | list[str], BeforeValidator(lambda value: "off" if value is False else value)
]


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline to fine-tune. Paths may be "tiny" for the model shipped with this package."""

    path: str
    precision: Precision = "fp32"
    max_sequence_length: int = 512  # T5 tokens
    text_cache: str | None = None  # directory of prompt embeddings (`srpo embed`) that runs may share; null: in memory
    kernels: Kernels = "auto"  # operators of srpo_kernels to patch in: all that fit, none, or a list of them
    # What transformer blocks keep for backward (srpo_kernels.checkpointing). Not none: nothing of the image path.
    checkpointing: Literal["none", "selective", "block", "auto"] = "none"
    image_chunk: int | None = None  # when it is: images decoded and scored at a time; null: all of a batch
    lora: LoraConfig | None = None  # adapters {rank, alpha, targets} to train on a frozen transformer; null: all of it

    def __post_init__(self) -> None:
        if not isinstance(self.kernels, str) and (not self.kernels or set(self.kernels) - set(PATCHABLE)):
            raise ValueError(f"model.kernels must be auto, off or names of {', '.join(PATCHABLE)}; got {self.kernels}")
        if self.image_chunk is not None and self.image_chunk < 1:
            raise ValueError(f"model.image_chunk must be at least 1 or null, got {self.image_chunk}")
        if not 1 <= self.max_sequence_length <= 512:
            raise ValueError(f"model.max_sequence_length must be in [1, 512], got {self.max_sequence_length}")


@dataclass(frozen=True)
class DataConfig:
    """Where prompts and real images come from."""

    mode: Literal["online", "offline", "mixed"] = "online"  # x0 from a rollout, from real images, or from either
    prompts: str | None = None  # txt, jsonl, csv or parquet file (online, mixed)
    images: str | None = None  # folder with metadata.jsonl, or a jsonl file (offline, mixed)
    offline_fraction: float = 0.5  # mixed: chance that a batch holds real images
    # Named control words, or phases [{group, start: first update}]; replaces srpo.positive_ and negative_controls.
    control_group: str | tuple[ControlPhase, ...] | None = None
    control_groups: dict[str, ControlGroup] | None = None  # groups of one's own: {name: {positive, negative}}
    max_bad_fraction: float = 0.01  # of the images that may be unusable; they are skipped and listed
    max_upscale: float = 1.0  # an image that must be enlarged more than this is unusable
    latent_cache: str | None = None  # directory of the images' VAE latents that runs may share; null: encoded when used

    def __post_init__(self) -> None:
        if self.mode != "offline" and self.prompts is None:
            raise ValueError(f"data.prompts is needed in {self.mode} mode")
        if self.mode != "online" and self.images is None:
            raise ValueError(f"data.images is needed in {self.mode} mode")
        if not 0 <= self.offline_fraction <= 1:
            raise ValueError(f"data.offline_fraction must be in [0, 1], got {self.offline_fraction}")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"data.max_bad_fraction must be in [0, 1), got {self.max_bad_fraction}")
        if not self.max_upscale > 0:
            raise ValueError(f"data.max_upscale must be positive, got {self.max_upscale}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is driven."""

    dir: str
    seed: int = 0
    device: str = "auto"  # auto: a GPU when there is one
    micro_batch: int = 1  # images per model call and branch, on each rank
    draws_per_rollout: int = 1  # timestep draws that share one clean batch
    # none: every rank holds everything; fsdp: parameters, gradients and states are shared out among ranks; hsdp: among
    # shard_size of them, each such group holding everything.
    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    shard_size: int | None = None
    # Sharded ranks average gradients in every backward, holding their shares; or in an update's last one, holding them
    # whole until then. Replicas (hsdp) average their shares in the last one either way.
    reduce: Literal["backward", "update"] = "backward"
    # Sharded weights gathered by a gradient's forward are freed until its backward, block by block; or stay, whole.
    reshard_after_forward: bool = True
    # Sharded weights are gathered whole for a rollout, or block by block in each of its steps, for lack of memory.
    rollout_gather: Literal["whole", "blocks"] = "whole"
    # With model.precision fp8, sharded weights of blocks' linear layers are gathered in e4m3, half the bytes; input
    # gradients are then of those.
    fp8_all_gather: bool = False
    rollout_solver: Solver = "euler"  # adams2: second order, so fewer srpo.rollout_steps for the same error
    save_every: int = 5  # updates between checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_every: int | None = None  # also kept: those of the updates that are multiples of this
    # Checkpoints are copied to host memory (a copy of all that a process holds of weights and states, kept for the next
    # one) and written during the next update; false: nothing goes on while they are written.
    save_async: bool = True
    sample_every: int = 5  # updates between sample grids; 0: none
    sample_count: int = 8  # images in a grid
    sample_steps: int = 25
    tensorboard: bool = True  # also write TensorBoard events when it is installed
    wandb: WandbConfig | None = None  # also log to Weights & Biases {project, name, mode}

    def __post_init__(self) -> None:
        for name, least in dict(
            micro_batch=1, draws_per_rollout=1, save_every=1, keep=2, sample_every=0, sample_count=1, sample_steps=1
        ).items():
            if getattr(self, name) < least:
                raise ValueError(f"run.{name} must be at least {least}, got {getattr(self, name)}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"run.keep_every must be at least 1 or null, got {self.keep_every}")
        if (self.sharding == "hsdp") != (self.shard_size is not None) or (self.shard_size or 1) < 1:
            raise ValueError(f"run.shard_size must be a number of ranks for hsdp, else null, got {self.shard_size}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `srpo.preset` in a recipe names the preset that the other `srpo` keys change.

    A baseline has a section of its own, which is there with its algorithm only, and shares `srpo` (docs/baselines.md).
    """

    model: ModelConfig
    reward: RewardConfig
    data: DataConfig
    run: RunConfig
    srpo: SRPOConfig = field(default_factory=SRPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    algorithm: AlgorithmName = "srpo"
    direct_align: DirectAlignConfig | None = None
    refl: ReFLConfig | None = None
    draft: DRaFTConfig | None = None
    dancegrpo: DanceGRPOConfig | None = None

    def __post_init__(self) -> None:
        for name, kind in BASELINES.items():
            if name == self.algorithm and getattr(self, name) is None:
                object.__setattr__(self, name, kind())
            elif name != self.algorithm and getattr(self, name) is not None:
                raise ValueError(f"section {name} is for algorithm {name}, but algorithm is {self.algorithm}")
        if self.baseline is not None:
            self.baseline.check(self.data.mode, self.run.draws_per_rollout, self.srpo.rollout_steps)
        check_reward(self.reward, self.srpo)
        check_validation(self.validation, self.run.sample_every, self.run.save_every)
        if self.run.sharding != "none" and self.optimizer.name != "srpo":
            raise ValueError("run.sharding needs optimizer.name srpo")
        if self.run.rollout_gather == "blocks" and self.run.sharding != "none" and self.data.mode == "mixed":
            raise ValueError(
                "run.rollout_gather blocks needs all ranks to roll out together: data.mode must not be mixed"
            )
        if self.run.rollout_gather == "blocks" and self.model.precision == "fp8-rollout":
            raise ValueError("run.rollout_gather blocks holds no e4m3 weights: model.precision must not be fp8-rollout")
        if self.model.lora and self.model.precision != "fp32" == self.optimizer.model_weights(self.model.precision):
            raise ValueError(
                f"model.lora with model.precision {self.model.precision} trains bf16 adapters: optimizer.name must be "
                f"srpo and optimizer.weights not fp32, got {self.optimizer.name} and {self.optimizer.weights}"
            )
        trained_in_fp8 = self.model.precision == "fp8" and not self.model.lora
        if self.run.fp8_all_gather and (self.run.sharding == "none" or not trained_in_fp8):
            raise ValueError("run.fp8_all_gather needs run.sharding, model.precision fp8 and no model.lora")
        if self.model.precision == "fp32" and self.optimizer.model_weights("fp32") != "fp32":
            weights = self.optimizer.weights
            raise ValueError(
                f"optimizer.weights {weights} trains bf16 weights, which model.precision fp32 does not have"
            )

    @property
    def baseline(self) -> BaselineConfig | None:
        """The algorithm's own section; None for SRPO."""
        return None if self.algorithm == "srpo" else getattr(self, self.algorithm)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or, for shipped ones, by name. Raises `InputError`."""
    shipped = Path(__file__).parent / "recipes"
    for candidate in (Path(name), shipped / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise InputError(f"recipe {name!r} is neither a file nor a shipped recipe ({known})")


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe with ``section.key=value`` overrides (values are YAML), checked and with defaults filled in.

    Raises `InputError` naming every unknown key (with the nearest valid one) and every value out of range.
    """
    path = find_recipe(str(recipe))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} must hold sections, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    _check_keys(values)
    values.setdefault("run", {}).setdefault("dir", f"runs/{path.stem}")
    try:
        return TypeAdapter(TrainConfig).validate_python(_with_presets(values))
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {_message(e)}" for e in error.errors()]
        raise InputError(f"recipe {path}: " + "; ".join(found)) from None


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML; `load_config` reads it back."""
    sections = {name: entries for name, entries in dataclasses.asdict(config).items() if entries is not None}
    return yaml.safe_dump(_plain(sections), sort_keys=False)


def _with_presets(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the two keys that stand for several: `srpo.preset` and `data.control_group`.

    Of a schedule of control words, `srpo` gets those that it starts with.
    """
    objective, data = dict(values.get("srpo", {})), dict(values.get("data", {}))
    if "preset" in objective:
        try:
            preset = SRPOConfig.preset(objective.pop("preset"))
        except ValueError as error:
            raise InputError(f"srpo.{error}") from None
        objective = {**dataclasses.asdict(preset), **objective}
    data["control_groups"] = groups = parse_groups(data.get("control_groups"))
    data["control_group"] = schedule = parse_schedule(data.get("control_group"), groups)
    if schedule is not None:
        first = control_group(schedule if isinstance(schedule, str) else schedule[0].group, groups)
        objective["positive_controls"], objective["negative_controls"] = first.positive, first.negative
    return {**values, "srpo": objective} | ({"data": data} if "data" in values else {})


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, name = key.split(".")
    if not (separator and (sections or name in _ALONE) and name and all(sections)):
        raise InputError(f"override {override!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: {error}") from None
    target = values
    for depth, section in enumerate(sections, 1):
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise InputError(f"section {'.'.join(sections[:depth])!r} must hold keys, got {target!r}")
    target[name] = value


#: Keys of no section.
_ALONE = ("algorithm",)


def _valid_keys() -> Iterator[str]:
    for section, hint in typing.get_type_hints(TrainConfig).items():
        for kind in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            yield from (f"{section}.{entry.name}" for entry in dataclasses.fields(kind))
    yield from (f"model.lora.{entry.name}" for entry in dataclasses.fields(LoraConfig))
    yield "srpo.preset"


def _check_keys(values: dict[str, Any]) -> None:
    valid = list(_valid_keys())
    sections = {key.partition(".")[0] for key in valid}
    problems = []
    for section, entries in values.items():
        if section in _ALONE:
            if entries not in ALGORITHMS:
                known = ", ".join(ALGORITHMS)
                problems.append(f"{section} must be one of {known}, got {entries!r}{nearest(entries, ALGORITHMS, 0.5)}")
        elif section not in sections:
            problems.append(f"unknown key {section!r}: {_hint(section, entries, sections, valid)}")
        elif not isinstance(entries, dict):
            raise InputError(f"section {section!r} must hold keys, got {entries!r}")
        else:
            keys = [f"{section}.{name}" for name in entries]
            if section == "model" and isinstance(entries.get("lora"), dict):
                keys += [f"model.lora.{name}" for name in entries["lora"]]
            problems += [f"unknown key {key!r}: {_nearest(key, valid)}" for key in keys if key not in valid]
    if problems:
        raise InputError("; ".join(problems))


def _hint(section: object, entries: object, sections: set[str], valid: list[str]) -> str:
    """For a mistyped section its nearest name, for a key without a section the full one."""
    by_name = {key.rpartition(".")[2]: key for key in valid}
    names = {name: name for name in sections} if isinstance(entries, dict) else by_name
    near = difflib.get_close_matches(str(section), names, 1, 0.5)
    return f"did you mean {names[near[0]]!r}?" if near else f"sections are {', '.join(sorted(sections))}"


def _nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(valid)}"


def _message(error: Any) -> str:
    if error["type"] == "value_error":  # raised by a dataclass, whose message already holds the value
        return str(error["ctx"]["error"])
    return error["msg"] if error["type"] == "missing" else f"{error['msg']}, got {error['input']!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice.pop()!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
