"""A training step as one CUDA graph: recorded once, replayed, and recorded anew when it must be.

A replay starts the kernels that were recorded, with the numbers that were recorded: Python does not
run.  A learning rate, a dropout rate, `requires_grad`, a step count on the host: all of them are
frozen into the graph, where an eager step reads them.  So

    what differs from the recording when an epoch begins   the step is recorded anew
    what each step itself changes on the host              no graph: every step is eager
    what cannot be recorded (it waits for the GPU, …)      no graph; the log names the operation

After a failed recording torch 2.3 may believe for good that one is under way: then the worker goes
on in a new process, which records nothing (hpo/gpu.py), and the trial goes back to the queue.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo import gpu
from hpo.words import logger

WARM_UP_STEPS = 3  # before a recording: cuDNN, cuBLAS and the optimiser allocate what they need

log = logger("hpo.train")


@cache
def side_stream() -> torch.cuda.Stream:
    """Return the stream of this process that records; CUDA forbids it on the default stream.

    One for all trials, because cuBLAS keeps a workspace for each stream that it has ever seen.
    """
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class CapturedStep:
    """Takes the steps of an epoch: eagerly, or as replays of a graph.

    The graph and its memory go when this does.
    """

    def __init__(
        self, step: Callable[[], None], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Prepare; `step` trains on one batch, at addresses that never change."""
        self.step, self.model, self.optimizer = step, model, optimizer
        self.device = next(model.parameters()).device
        self.wanted = self.device.type == "cuda" and not os.environ.get(gpu.NO_CUDA_GRAPHS)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._recorded: dict[str, object] = {}  # what the graph has frozen
        self._said = False

    def take(self, steps: int) -> None:
        """Take so many steps.

        Raises:
            Unusable: a recording has failed, and CUDA of this process with it.
        """
        done = 0
        if self.graph:
            self._drop_what_is_out_of_date()
        if self.wanted and not self.graph and steps > WARM_UP_STEPS:
            done = self._warm_up_and_record()
        run = self.graph.replay if self.graph else self.step
        for _ in range(done, steps):
            run()

    def _drop_what_is_out_of_date(self) -> None:
        changed = differences(self._recorded, self._frozen())
        if changed:
            self.graph = None
        if changed and not self._said:
            self._said = True
            log.info(
                "changed since the CUDA graph was recorded: %s; recording anew", names(changed)
            )

    def _frozen(self) -> dict[str, object]:
        return dict(frozen(self.model, self.optimizer, self.device))

    def _warm_up_and_record(self) -> int:
        """Take the first steps of the epoch eagerly, then record; return how many were taken.

        Recording computes nothing: the model and the optimiser stay as they are.
        """
        side, current = side_stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS - 1):
                self.step()
            before = self._frozen()
            self.step()
        current.wait_stream(side)
        self._recorded = self._frozen()
        if why := self._obstacle(differences(before, self._recorded)):
            self.wanted = False
            log.warning("no CUDA graph, training eagerly: %s", why)
            return WARM_UP_STEPS
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self.step()
            self.graph = graph
        except Exception as error:  # whatever the model raises; BaseException ends the trial
            self._give_up(error, current)
        return WARM_UP_STEPS

    def _obstacle(self, changed: list[str]) -> str:
        if changed:
            return f"each step changes {names(changed)}, and a replay would not"
        if not all(group.get("capturable", True) for group in self.optimizer.param_groups):
            return f"{type(self.optimizer).__name__} is not capturable=True"
        return ""

    def _give_up(self, error: Exception, current: torch.cuda.Stream) -> None:
        """Go on eagerly after a recording that failed, in a new process if need be."""
        cause = first_cause(error)
        if not isinstance(cause, Exception):
            raise cause  # SIGTERM
        self.wanted = False
        torch.cuda.set_stream(current)  # torch 2.3 leaves the other one
        why = f"no CUDA graph, training eagerly: {where(cause)}"
        log.warning("%s", why)
        works = still_works(self.device)
        if works and isinstance(cause, torch.cuda.OutOfMemoryError):
            return  # a smaller net may fit
        os.environ[gpu.NO_CUDA_GRAPHS] = "1"  # what this script does, it does in each trial
        if not works:
            raise gpu.give_up(f"{why}; CUDA of this process is spoilt by that", gpu.NO_CAPTURE)


# ---------- What a recording freezes ----------


def frozen(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[tuple[str, object]]:
    """Give what a recorded step holds fast of the host's numbers and addresses, with its name."""
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                yield f"{key} of parameter group {number}", held(value, device)
    for number, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.device != device:
                yield f"{key} in the optimiser's state {number}", held(value, device)
    for key, value in vars(optimizer).items():
        if key[0] != "_":  # of torch's own: whether step() was called, …
            yield f"{type(optimizer).__name__}.{key}", held(value, device)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            yield f"{name or type(module).__name__}.{key}", held(value, device)
        hooks = (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks)
        yield f"the hooks of {name or type(module).__name__}", hooks
    for name, parameter in model.named_parameters():
        yield f"{name}.requires_grad", parameter.requires_grad
        yield f"the address of {name}", parameter.data_ptr()


def held(value: Any, device: torch.device) -> object:
    """Return what of a value is frozen: a number; of a tensor on the device its address alone."""
    if isinstance(value, (bool, int, float, complex, str)) or value is None:
        return value
    if isinstance(value, Tensor):
        on_host = value.device != device and value.numel() <= 16
        return tuple(value.flatten().tolist()) if on_host else value.data_ptr()
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return tuple(held(each, device) for each in value)
    return None  # an object: nobody can say what of it a step reads


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of what is not the same; in a tuple, because NaN is not equal to itself."""
    return [key for key in {**before, **after} if (before.get(key),) != (after.get(key),)]


def names(changed: list[str]) -> str:
    """Return the first of them, for a line of the log."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more


# ---------- When it has failed ----------


def first_cause(error: BaseException) -> BaseException:
    """Return what was raised first: the end of a recording that has failed raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def where(error: BaseException) -> str:
    """Return in one line what happened, and in which line of the script."""
    library = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(library)]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{place}"


def still_works(device: torch.device) -> bool:
    """Whether this process can go on after a failed recording; the random numbers stay as they are.

    On torch 2.3 the allocator, or the generator, may believe that it is still under way.
    """
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        state = torch.cuda.get_rng_state(device)
        torch.randperm(2, device=device)
        torch.cuda.set_rng_state(state, device)
        torch.cuda.synchronize()
        return not torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        return False
