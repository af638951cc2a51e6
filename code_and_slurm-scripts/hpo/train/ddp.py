"""One trial over several GPUs of a node (GPUS_PER_TRIAL=2), with DistributedDataParallel.

    loss = together(train_model, config, trial)           in the objective

With GPUS_PER_TRIAL=1 that is train_model(config, trial).  Otherwise as many processes run it at
once, one per GPU (on a CPU: for tests), and in train_model

    model = parallel(net)           sums the gradients of all processes in the backward pass
    rank(), processes()             0 and 1 where there is one process
    synchronised(model, last)       the context of one micro-batch
    total(tensor)                   the sum over all processes

The processes know no Optuna study.  Their `trial` asks the worker, which alone talks to Optuna: it
carries out trial.report and trial.should_prune once and gives every process the same answer.  The
worker waits for nothing but their words, never for a GPU, so that whatever goes wrong in one of
them (an exception, a crash) ends all of them, and the trial with the reason.  If the worker dies,
so do they.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias, cast

import optuna
import torch
from torch import Tensor, distributed, nn

from hpo import gpu
from hpo.drain import signals_held
from hpo.settings import Settings, UserError, use
from hpo.study.upkeep import write_at_once

TrainModel: TypeAlias = Callable[[dict[str, Any], Any], float]  # configuration, trial
Connection: TypeAlias = "connection.Connection[Any, Any]"
DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # for the worker, hpo/drain.py


def check_gpus() -> None:
    """Raise UserError if this worker sees fewer GPUs than a trial shall have."""
    wanted, seen = Settings.from_env().gpus_per_trial, torch.cuda.device_count()
    if wanted > seen and torch.cuda.is_available():
        raise UserError(
            f"GPUS_PER_TRIAL={wanted}, but this worker sees {seen} GPU(s); in the batch script: "
            f"--ntasks-per-node=1 and --gpus-per-task={wanted}"
        )


def rank() -> int:
    """Return the number of this process among those of its trial."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """Return how many processes run this trial."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def parallel(model: nn.Module) -> nn.Module:
    """Return the model, such that `backward` gives the mean of all processes' gradients."""
    return nn.parallel.DistributedDataParallel(model) if processes() > 1 else model


def synchronised(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Return the context of a forward and backward pass.

    Only the last micro-batch of a step exchanges gradients (`now`); until then they add up.
    """
    return model.no_sync() if processes() > 1 and not now else nullcontext()  # type: ignore[operator]


def total(value: Tensor) -> float:
    """Return the sum of every process's `value`, () float32."""
    if processes() > 1:
        distributed.all_reduce(value)
    return value.item()


def together(train_model: TrainModel, config: dict[str, Any], trial: optuna.Trial) -> float:
    """Return train_model(config, trial), run by GPUS_PER_TRIAL processes.

    Raises:
        optuna.TrialPruned: as train_model does.
        Exception: what one of the processes raised; RuntimeError if it died.
    """
    settings = Settings.from_env()
    number = settings.gpus_per_trial
    if number == 1:
        return train_model(config, trial)
    write_at_once(trial)
    with tempfile.TemporaryDirectory(prefix="optuna-ddp-") as folder:
        started: list[tuple[SpawnProcess, Connection]] = []
        try:
            for each in range(number):
                place = (trial.number, f"{folder}/meeting", each, number)
                _start((settings, train_model, config, *place), started)
            return _serve(trial, started)
        finally:
            for process, _ in started:
                process.kill()
                process.join()


def _start(arguments: tuple[Any, ...], started: list[tuple[SpawnProcess, Connection]]) -> None:
    """Start one process, deaf to the signals that are meant for the worker; add it to `started`."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(*arguments, its))
    resource_tracker.ensure_running()  # otherwise `start` does, and unblocks the signals
    with signals_held():  # before one can raise, the process is in `started`, and so is ended
        signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)  # and stay blocked in a new process
        try:
            process.start()
            its.close()  # so that the pipe ends with the process
            started.append((process, mine))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)


def _serve(trial: optuna.Trial, started: list[tuple[SpawnProcess, Connection]]) -> float:
    """Answer the processes, which all make the same calls, until they return the loss."""
    pipes = [pipe for _, pipe in started]
    while True:
        said: dict[int, tuple[str, Any]] = {}
        while len(said) < len(pipes):
            for pipe in connection.wait([p for i, p in enumerate(pipes) if i not in said]):
                each = pipes.index(cast("Connection", pipe))
                said[each] = _hear(each, *started[each])
        call, arguments = said[0]
        if call == "return":
            return float(arguments)
        answer = getattr(trial, call)(*arguments)
        for pipe in pipes:
            pipe.send(answer)


def _hear(each: int, process: SpawnProcess, pipe: Connection) -> tuple[str, Any]:
    try:
        call, arguments = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise RuntimeError(
            f"process {each} of the trial died (exit status {process.exitcode})"
        ) from None
    if call == "raise":
        raise arguments
    return call, arguments


# ---------- In the processes ----------


class RemoteTrial:
    """What a process of the trial sees of it: the calls are carried out by the worker."""

    def __init__(self, number: int, pipe: Connection) -> None:
        self.number = number
        self._pipe = pipe

    def report(self, value: float, step: int) -> None:
        """Report a value that is the same in every process."""
        self._ask("report", value, step)

    def should_prune(self) -> bool:
        """Whether the pruner sees no chance for the trial."""
        return bool(self._ask("should_prune"))

    def _ask(self, call: str, *arguments: float) -> Any:
        self._pipe.send((call, arguments))
        return self._pipe.recv()


def _run(
    settings: Settings,
    train_model: TrainModel,
    config: dict[str, Any],
    trial_number: int,
    meeting: str,
    each: int,
    number: int,
    pipe: Connection,
) -> None:
    use(settings)  # the worker's, which a check may have changed
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    try:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(each)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: no network needed
        # As torchrun does: the Trainer of transformers looks there.
        os.environ.update(RANK=str(each), LOCAL_RANK=str(each))
        os.environ.update(WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number))
        distributed.init_process_group(
            backend, init_method=f"file://{meeting}", rank=each, world_size=number
        )
        trial = cast("optuna.Trial", RemoteTrial(trial_number, pipe))
        pipe.send(("return", train_model(config, trial)))
    except optuna.TrialPruned as pruned:
        pipe.send(("raise", pruned))
    except (Exception, gpu.Unusable) as error:
        traceback.print_exc()  # in the worker's log; an exception is sent without it
        _send(pipe, error)
    pipe.recv()  # the worker ends all processes at once


def _send(pipe: Connection, error: BaseException) -> None:
    try:
        pipe.send(("raise", error))
    except (TypeError, AttributeError, ValueError):  # an exception that cannot be pickled
        pipe.send(("raise", RuntimeError(f"{type(error).__name__}: {error}")))


def _end_with_the_worker() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)
