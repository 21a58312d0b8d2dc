"""Steps inside backward: a block of parameters as soon as its gradients are there, which are then freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srpo_kernels.optim.adamw import AdamW
from srpo_kernels.optim.norm import GradientNorm, finite_norm, local_sums, norm_of
from srpo_kernels.optim.options import check_gradient
from srpo_kernels.optim.sharding import add_up, local
from srpo_kernels.optim.telemetry import Sums, telemetry
from srpo_kernels.optim.work import places, stepped, with_gradients, work_for

__all__ = ["StepInBackward", "step_in_backward"]

Clip = Literal["none", "previous", "two_pass"]


def step_in_backward(
    optimizer: AdamW, clip: Clip = "none", *, blocks: Iterable[nn.Module | Iterable[Tensor]] = ()
) -> StepInBackward:
    """Have backward step each parameter as soon as its gradient is there, and free the gradient.

    The loop stays as it is, one backward to a step; `optimizer.step()` ends the step: it steps what is left, fills
    `telemetry`, and lets learning rate schedulers go on. Within `blocks` parameters are stepped together, by one call,
    when the last of their gradients has come: only one block's gradients are alive at a time.

    | `clip` | coefficient from | a gradient that is not finite |
    |---|---|---|
    | `none` | 1: the bits of `step()` without `max_grad_norm` | leaves its block as it was, step count included |
    | `previous` | the larger of two norms: of the last step, and of what has come in this one | the same |
    | `two_pass` | the exact norm, by one more backward: the bits of `step()` | leaves everything as it was |

    So `previous` clips its first step and sudden peaks too, if less: what n equal blocks add up to is at most
    `max_grad_norm` times the square root of 1 + 1/2 + ... + 1/n. With `two_pass`, ``loss.backward()`` becomes
    ``handle.backward(closure)``.

    FSDP2: gradients come when they have been reduced; blocks should be the modules that were sharded, for each takes an
    all-reduce. Other parameters of several processes (DistributedDataParallel, FSDP1) are refused, for their gradients
    come before they have been averaged; so is, when it happens, reentrant checkpointing of a parameter used twice.

    Args:
        optimizer: one handle at a time. clip: see above; `max_grad_norm` must be None for "none", and only then.
        blocks: modules, or parameters, that are stepped together; others are stepped one by one, and what is not the
            optimizer's is left alone. Of blocks that share a parameter, it belongs to the first.

    Returns:
        A handle: `remove()` it, or use it as a context.

    Raises:
        TypeError, ValueError: an unusable argument. RuntimeError: the optimizer has a handle already. Within backward:
            RuntimeError, if a parameter gets a second gradient before `optimizer.step()`.
    """
    return StepInBackward(optimizer, clip, blocks)


class _Progress:
    """What is known within one step."""

    def __init__(self, blocks: list[list[Tensor]]) -> None:
        self.seen: set[Tensor] = set()
        self.waiting = {id(block): len(block) for block in blocks}  # gradients that have not come
        self.streams: set[torch.cuda.Stream] = set()  # that gradients came on
        self.parts: list[Sums] = []  # of the first of two passes: sums of gradients
        self.norm: GradientNorm | None = None  # from it
        self.running: Tensor | None = None  # otherwise: sums of the gradients so far, over all processes
        self.sums: list[Sums] = []
        self.stepped: list[Tensor] = []


class StepInBackward:
    """What `step_in_backward` returns."""

    def __init__(self, optimizer: AdamW, clip: Clip, blocks: Iterable[nn.Module | Iterable[Tensor]]) -> None:
        _check(optimizer, clip)
        self.optimizer, self.clip = optimizer, clip
        self._places = places(optimizer)
        trained = [parameter for parameter in self._places if parameter.requires_grad]
        self._blocks = _blocks(blocks, trained)
        self._block_of = {parameter: block for block in self._blocks for parameter in block}
        self._measuring = False
        self._previous: Tensor | None = None  # norm of the last step
        self._now = _Progress(self._blocks)
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in trained]
        optimizer._in_backward = self

    def remove(self) -> None:
        """Step at `optimizer.step()` again. Belongs between steps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.optimizer._in_backward is self:
            self.optimizer._in_backward = None

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Both passes of ``clip="two_pass"``; `optimizer.step()` follows.

        `closure` returns the loss and calls no backward. It is called twice and must do the same both times: the
        global random state of the CPU and of the parameters' GPU is put back in between, as in
        `torch.utils.checkpoint`, but no other generator, and running statistics of layers count twice.

        Returns:
            The loss of the second pass, without its graph.

        Raises:
            RuntimeError: another `clip`, or a gradient is left of before. TypeError: `closure` did not return a loss.
        """
        if self.clip != "two_pass":
            raise RuntimeError(f'step_in_backward: backward(closure) needs clip="two_pass", not "{self.clip}"')
        if self._now.seen or with_gradients(self.optimizer):
            raise RuntimeError("step_in_backward: gradients are left of before: call optimizer.step() or zero_grad()")
        device = next(iter(self._places)).device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._measuring = True
                _loss(closure).backward()
                self._take(with_gradients(self.optimizer))
        except BaseException:
            self.optimizer.zero_grad()  # nothing has been stepped
            self._now = _Progress(self._blocks)
            raise
        finally:
            self._measuring = False
        parts, self._now = self._now.parts, _Progress(self._blocks)
        self._now.norm = norm_of(add_up(parts)) if parts else None
        loss = _loss(closure)
        loss.backward()
        return loss.detach()

    # --- within backward ----------------------------------------------------------------------

    def _arrived(self, parameter: Tensor) -> None:
        if parameter in self._now.seen:
            number, index, _ = self._places[parameter]
            raise RuntimeError(
                f"step_in_backward: parameter {index} of group {number} got a second gradient before optimizer.step(): "
                "gradients do not accumulate, so call step() after every backward, and sum losses before it"
            )
        if self.clip == "two_pass" and self._now.norm is None and not self._measuring:
            raise RuntimeError('step_in_backward: with clip="two_pass" call handle.backward(closure), not backward()')
        self._now.seen.add(parameter)
        if parameter.is_cuda:
            self._now.streams.add(torch.cuda.current_stream(parameter.device))
        block = self._block_of[parameter]
        self._now.waiting[id(block)] -= 1
        if not self._now.waiting[id(block)]:
            self._take([each for each in block if each.grad is not None])

    @torch.no_grad()
    def _take(self, parameters: list[Tensor]) -> None:
        """Step `parameters`, or only add up their gradients, and free these."""
        if not parameters:
            return
        self.optimizer._check_exact("step")
        where = self._places if all(each in self._places for each in parameters) else places(self.optimizer)
        gradients = [check_gradient(parameter, *where[parameter][:2]) for parameter in parameters]
        self._join_streams(gradients)
        if self._measuring:
            self._now.parts += local_sums(gradients)
        else:
            norm, coefficient = self._clipped(gradients)
            work = work_for(self.optimizer, parameters, where)
            self._now.sums += self.optimizer._advance(work, norm, coefficient)
            self._now.stepped += stepped(work)
        for parameter in parameters:
            parameter.grad = None

    def _clipped(self, gradients: list[Tensor]) -> tuple[GradientNorm, Tensor]:
        """Norm, which says whether to step by `gradients`, and their coefficient."""
        if self._now.norm is not None:
            return self._now.norm, self.optimizer._coefficient(self._now.norm)
        added = add_up(local_sums(gradients))
        self._now.running = added if self._now.running is None else self._now.running + added
        norm, running = norm_of(added), finite_norm(self._now.running)
        if self.clip == "previous" and self._previous is not None:
            running = torch.maximum(running, self._previous)
        return norm, self.optimizer._coefficient(GradientNorm(running, norm.finite, norm.nonfinite))

    def _join_streams(self, gradients: list[Tensor]) -> None:
        """Have this stream, which backward or FSDP2 chose, wait for those that gradients came on, and own these."""
        if not self._now.streams:  # on a CPU
            return
        current = torch.cuda.current_stream(gradients[0].device)
        for stream in self._now.streams - {current}:
            current.wait_stream(stream)
        for gradient in gradients:
            local(gradient).record_stream(current)

    def _end(self) -> None:
        """`AdamW.step`."""
        left = with_gradients(self.optimizer)
        if not left and not self._now.seen:
            raise RuntimeError("step_in_backward: optimizer.step() without a gradient since the last step")
        self._take(left)
        norm = self._now.norm
        if self._now.running is not None:
            norm = norm_of(self._now.running)
            self._previous = finite_norm(self._now.running)
        if norm is not None and self._now.sums:
            self.optimizer.telemetry = telemetry(norm, self._now.sums, self._now.stepped)
        self._now = _Progress(self._blocks)


def _check(optimizer: AdamW, clip: str) -> None:
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"step_in_backward: optimizer must be srpo_kernels.optim.AdamW, got {type(optimizer).__name__}")
    if clip not in get_args(Clip):
        raise ValueError(f"step_in_backward: clip must be one of {', '.join(get_args(Clip))}, got {clip!r}")
    if (clip == "none") != (optimizer.max_grad_norm is None):
        raise ValueError(f"step_in_backward: clip={clip!r} does not go with max_grad_norm={optimizer.max_grad_norm}")
    if optimizer._in_backward is not None:
        raise RuntimeError("step_in_backward: optimizer steps in backward already: remove() that handle first")
    if dist.is_initialized() and dist.get_world_size() > 1:
        for parameter, (number, index, _) in places(optimizer).items():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"step_in_backward: parameter {index} of group {number} is not sharded by FSDP2: its gradient "
                    "would be used before it is averaged over the processes"
                )


def _blocks(blocks: Iterable[nn.Module | Iterable[Tensor]], trained: list[Tensor]) -> list[list[Tensor]]:
    """Parameters that are stepped together: those of `blocks`, then each of the others."""
    found, rest = [], dict.fromkeys(trained)
    for number, block in enumerate(blocks):
        parameters = block.parameters() if isinstance(block, nn.Module) else block
        members = list(parameters) if isinstance(parameters, Iterable) and not isinstance(block, Tensor) else [None]
        if not all(isinstance(member, Tensor) for member in members):
            raise TypeError(f"step_in_backward: blocks[{number}] must be a module or a list of parameters")
        found.append([member for member in dict.fromkeys(members) if member in rest])
        for parameter in found[-1]:
            del rest[parameter]
    return [block for block in found if block] + [[parameter] for parameter in rest]


def _loss(closure: Callable[[], Tensor]) -> Tensor:
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError("step_in_backward: closure must return a loss: a tensor of one element with its graph")
    return loss
