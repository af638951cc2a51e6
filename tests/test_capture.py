"""A step as a CUDA graph, with stand-ins for CUDA: what a recording freezes, and one that fails."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import gpu
from hpo.train import capture
from hpo.train.capture import WARM_UP_STEPS, CapturedStep

STEPS = 10


class Loop:
    """A net with dropout, an optimiser, and the step that trains it."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 1))
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)  # type: ignore[call-arg]
        self.taken = 0
        self.captured = CapturedStep(self.step, self.model, self.optimizer)
        self.captured.wanted = True

    def step(self) -> None:
        """Train on one batch."""
        self.taken += 1
        self.optimizer.zero_grad()
        self.model(torch.ones(3, 4)).square().mean().backward()
        self.optimizer.step()

    def weights(self) -> Tensor:
        """Return all parameters in one vector."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: a replay knows the numbers of its recording alone."""

    loop: Loop

    def __init__(self) -> None:
        self.replays = 0

    def record(self) -> None:
        """Note what is frozen, and what the recording must leave as it is."""
        loop = self.loop
        self.groups = [{**group} for group in loop.optimizer.param_groups]
        self.rates = [m.p for m in loop.model.modules() if isinstance(m, nn.Dropout)]
        self.kept = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))
        self.random = torch.get_rng_state()

    def end(self) -> None:
        """Undo what the recorded step has computed: recording runs nothing."""
        self.loop.model.load_state_dict(self.kept[0])
        self.loop.optimizer.load_state_dict(self.kept[1])
        torch.set_rng_state(self.random)

    def replay(self) -> None:
        """Take a step with the frozen numbers."""
        self.replays += 1
        loop = self.loop
        dropouts = [m for m in loop.model.modules() if isinstance(m, nn.Dropout)]
        now = [{**group} for group in loop.optimizer.param_groups], [m.p for m in dropouts]
        self._set(dropouts, self.groups, self.rates)
        loop.step()
        self._set(dropouts, *now)

    def _set(self, dropouts: list[nn.Dropout], groups: list[Any], rates: list[float]) -> None:
        for group, values in zip(self.loop.optimizer.param_groups, groups, strict=True):
            group.update(values)
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Replace what a recording needs of torch.cuda; give the graphs that are made."""
    made: list[FakeGraph] = []

    def make_graph() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    @contextlib.contextmanager
    def record(graph: FakeGraph, stream: object) -> Iterator[None]:
        graph.record()
        yield
        graph.end()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(capture, "side_stream", lambda: stream)
    for name, value in {
        "current_stream": lambda: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": make_graph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capture, "still_works", lambda device: True)
    monkeypatch.setattr(gpu, "ending", None)
    monkeypatch.setenv(gpu.NO_CUDA_GRAPHS, "")  # give it back what it was
    return made


def recorded(loop: Loop) -> Loop:
    """Return the loop after its first epoch, in which the step was recorded."""
    FakeGraph.loop = loop
    loop.captured.take(STEPS)
    return loop


def test_steps_after_the_warm_up_are_replays(graphs: list[FakeGraph]) -> None:
    loop = recorded(Loop())
    loop.captured.take(STEPS)
    assert len(graphs) == 1  # for the whole trial
    assert graphs[0].replays == 2 * STEPS - WARM_UP_STEPS


def test_an_epoch_too_short_to_warm_up_stays_eager(graphs: list[FakeGraph]) -> None:
    loop = Loop()
    loop.captured.take(WARM_UP_STEPS)
    assert (graphs, loop.taken) == ([], WARM_UP_STEPS)


def set_rate(loop: Loop) -> None:
    """Do what a learning-rate schedule does."""
    loop.optimizer.param_groups[0]["lr"] = 0.002


def set_dropout(loop: Loop) -> None:
    """Regularise more from now on."""
    loop.model[1].p = 0.3


def freeze(loop: Loop) -> None:
    """Train the last layer alone."""
    for parameter in loop.model[0].parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("change", [set_rate, set_dropout, freeze])
def test_what_changes_between_epochs_takes_effect(
    change: Callable[[Loop], None], graphs: list[FakeGraph], caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights as eager steps, to the last bit; the log says it once."""
    ends = []
    with caplog.at_level(logging.INFO):
        for eager in (False, True):
            loop = Loop()
            loop.captured.wanted = not eager
            recorded(loop)
            torch.manual_seed(1)
            change(loop)
            loop.captured.take(STEPS)
            loop.captured.take(STEPS)
            ends.append(loop.weights())
    assert torch.equal(*ends)
    assert len(graphs) == 2
    assert graphs[1].replays == 2 * STEPS - WARM_UP_STEPS
    assert sum("recording anew" in r.getMessage() for r in caplog.records) == 1


def test_rate_of_zero_leaves_the_weights_alone(graphs: list[FakeGraph]) -> None:
    loop = recorded(Loop())
    before = loop.weights()
    loop.optimizer.param_groups[0]["lr"] = 0.0
    loop.captured.take(STEPS)
    assert torch.equal(loop.weights(), before)
    assert graphs[1].replays


class Counting(nn.Module):
    """Counts its steps on the host, as a schedule inside a model does."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the same."""
        self.steps += 1
        return x


def test_what_each_step_changes_on_the_host_is_refused_aloud(
    graphs: list[FakeGraph], caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop()
    loop.model.append(Counting())
    recorded(loop)
    assert (graphs, loop.taken, loop.model[3].steps) == ([], STEPS, STEPS)
    assert "each step changes 3.steps, and a replay would not" in caplog.text


def test_an_optimiser_that_counts_on_the_host_trains_eagerly(
    graphs: list[FakeGraph], caplog: pytest.LogCaptureFixture
) -> None:
    loop = recorded(Loop(torch.optim.AdamW))
    assert (graphs, loop.taken) == ([], STEPS)
    assert "AdamW is not capturable=True" in caplog.text
    assert not os.environ[gpu.NO_CUDA_GRAPHS]  # another trial may have another optimiser


def failing(error: type[RuntimeError], patch: pytest.MonkeyPatch) -> None:
    """Let the recorded step fail as on a GPU: the end of the recording raises once more."""

    @contextlib.contextmanager
    def record(graph: FakeGraph, stream: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    patch.setattr(torch.cuda, "graph", record)

    def forward(x: Tensor) -> Tensor:
        if len(calls := forward.__dict__.setdefault("calls", [])) == WARM_UP_STEPS:
            calls.append(1)
            raise error("operation not permitted when stream is capturing\nsecond line")
        calls.append(1)
        return x

    patch.setattr(nn.Dropout, "forward", lambda self, x: forward(x))


@pytest.mark.parametrize("error", [RuntimeError, torch.cuda.OutOfMemoryError])
def test_a_failed_recording_trains_eagerly_and_names_the_operation(
    error: type[RuntimeError],
    graphs: list[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager = Loop()
    for _ in range(STEPS):
        eager.step()
    failing(error, monkeypatch)
    loop = recorded(Loop())
    monkeypatch.undo()
    assert torch.equal(loop.weights(), eager.weights())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "no CUDA graph, training eagerly: operation not permitted when stream is capturing ("
        "test_capture.py:"
    )
    assert 'raise error("operation' in line


def test_where_the_process_is_spoilt_the_worker_gets_another(
    graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(RuntimeError, monkeypatch)
    monkeypatch.setattr(capture, "still_works", lambda device: False)
    with pytest.raises(gpu.Unusable, match="not permitted when stream is capturing") as raised:
        recorded(Loop())
    assert raised.value.status == gpu.NO_CAPTURE
    assert gpu.ending is raised.value
    # In the new process, and in this one if it goes on: nothing is recorded again.
    assert os.environ[gpu.NO_CUDA_GRAPHS] == "1"


def test_sigterm_during_a_recording_is_not_taken_for_a_failure(
    graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        """As hpo.drain.Drained."""

    failing(Stop, monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        recorded(Loop())


@pytest.mark.parametrize(("asserts", "works"), [("empty_cache", False), ("", True)])
def test_still_works(asserts: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.3's allocator asserts that no recording is under way."""

    def call(name: str) -> Callable[..., Any]:
        def stand_in(*arguments: object) -> None:
            if name == asserts:
                raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

        return stand_in

    names = ("synchronize", "empty_cache", "get_rng_state", "set_rng_state")
    for name in (*names, "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, call(name))
    assert capture.still_works(torch.device("cpu")) == works
