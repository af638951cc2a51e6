"""What a trial needs: its time and its memory, from a few short trials."""

from __future__ import annotations

import math
import resource
import sys

from hpo.check.bench import Bench
from hpo.check.short_trial import Do, Outcome, after
from hpo.check.table import Table, progress
from hpo.settings import Settings
from hpo.words import duration, parameters

LARGEST_SECONDS = 15.0  # at most, for two epochs with the last value of each parameter
ALL_SECONDS = 15.0  # at most, for two epochs on all images
CONTEXT = 0.5e9  # bytes that CUDA itself takes of a GPU


def time_rows(bench: Bench, table: Table) -> None:
    """Extrapolate the time of a trial, from middle values and from the last ones."""
    whole = bench.whole
    if not whole.reports:
        table.add("time", "about", f"{duration(whole.seconds)} for this trial {_on(bench.few)}")
        return
    needed = 5 * (whole.first_report + whole.epoch)
    values = bench.pick(0.5) if bench.left() > needed else None
    if values is None and bench.search_space is not None:
        here = f"{duration(whole.epoch)} per epoch of the first trial {_on(bench.few)}"
        table.add("time", "about", f"{here} {device()}; no time for more")
        return
    progress("how long a trial takes")
    middle = _two_epochs(bench, values or bench.values, bench.few)
    if not middle.reports:
        table.add("time", "look", f"with middle values the trial fails: {middle.reason}")
        return
    seconds, basis = _on_all_images(bench, values or bench.values, middle)
    table.add("time", "about", f"{_trial(bench, middle, seconds)} {device()}, {basis}; values:")
    table.add("", "", parameters(middle.params))
    if bench.search_space is not None:
        table.add("", "", _largest(bench, seconds / max(middle.epoch, 1e-9)))


def _largest(bench: Bench, factor: float) -> str:
    last = _two_epochs(bench, bench.pick(1.0) or {}, bench.few, LARGEST_SECONDS)
    if last.reports:
        return f"{_trial(bench, last, factor * last.epoch)}; last value of each"
    why = last.reason or f"more than {duration(LARGEST_SECONDS)} for {bench.few} images"
    return f"last value of each: not measured ({why})"


def _two_epochs(
    bench: Bench, values: dict[str, object], images: int, limit: float = math.inf
) -> Outcome:
    """Run two epochs, where there are two: the first pays for the start."""
    number = min(2, len(bench.whole.reports))
    return bench.trial(values, images).run(after(number, Do.END), limit)


def _on_all_images(bench: Bench, values: dict[str, object], middle: Outcome) -> tuple[float, str]:
    """Return the seconds of an epoch on all images, and from what that is known."""
    few, images = bench.few, bench.images
    if few == images:
        return middle.epoch, "measured"
    if not bench.images_matter:
        return middle.epoch, "from 2 epochs (TRAIN_IMAGES makes no difference)"
    more = min(4 * few, images)
    if 2 * middle.epoch * images / few < min(ALL_SECONDS, bench.left() / 2):
        more = images
    larger = _two_epochs(bench, values, more, max(bench.left(), LARGEST_SECONDS))
    if not larger.reports:
        return middle.epoch * images / few, f"from 2 epochs with {few} of {images} images"
    if larger.reports == middle.reports or larger.epoch - middle.epoch < middle.epoch / 10:
        return larger.epoch, "from 2 epochs (TRAIN_IMAGES makes no difference)"
    if more == images:
        return larger.epoch, "from 2 epochs"
    slope = (larger.epoch - middle.epoch) / (more - few)
    basis = f"from 2 epochs each with {few} and {more} of {images} images"
    return middle.epoch + slope * (images - few), basis


def _trial(bench: Bench, outcome: Outcome, seconds: float) -> str:
    """Return how long the trial would take with `seconds` per epoch."""
    epochs = outcome.params.get(bench.epochs_name, outcome.config.get("epochs"))
    if not isinstance(epochs, int) and bench.whole.ended and not bench.epochs_name:
        epochs = len(bench.whole.reports)
    if not isinstance(epochs, int):
        return f"{duration(seconds)} per epoch"
    start = max(0.0, outcome.first_report - outcome.epoch)
    return f"{duration(start + epochs * seconds)} per trial of {epochs} epochs"


def _on(images: int) -> str:
    return f"with TRAIN_IMAGES={images}"


def memory_row(bench: Bench, table: Table) -> None:
    """Say what the trials so far needed at most."""
    processes = Settings.from_env().gpus_per_trial
    torch = sys.modules.get("torch")
    if processes > 1 and torch is not None and torch.cuda.is_available():
        table.add("memory", "-", "not measured: the trial's own processes hold the GPUs")
    elif on_gpu():
        held = sys.modules["torch"].cuda.max_memory_reserved() + CONTEXT
        table.add("memory", "about", f"{held / 1e9:.1f} GB at most in these trials {device()}")
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if processes > 1:
            each = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            held += processes * each
        of = f", {processes} processes and the worker" if processes > 1 else ""
        text = f"{held / 1e9:.1f} GB at most in these trials {device()}{of}"
        table.add("memory", "about", text)


def on_gpu() -> bool:
    """Return whether the trials have used one."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return bool(cuda and cuda.is_initialized() and cuda.max_memory_allocated() > 0)


def device() -> str:
    """Return where the trials ran."""
    if on_gpu():
        return f"on {sys.modules['torch'].cuda.get_device_name()}"
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
    return f"on this CPU ({threads} thread{'s' * (threads > 1)})"
