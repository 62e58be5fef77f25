"""One row of a comparison: both sides started, checked against each other, timed in turn."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from experiments.common.peer_cases import Case, Generation
from experiments.common.peer_flops import Products, products, rate_sizes, step_flops
from experiments.common.peers import (
    COMPILED,
    EAGER,
    OURS,
    TUNED,
    DisagreementError,
    Job,
    PeerError,
    Worker,
)
from experiments.common.runtime import malloc_environment

# How far the first losses may be apart: what bf16 rounds is rounded at other places.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    **Attributes:** `rounds`, pairs of turns; `steps`, the most training steps of a turn, and
    `turn_seconds`, how long it may take with several; `threads`, 0 for all cores; `compiled`,
    whether the peer runs a second time, compiled; `profile`, whether a step is traced; `device`,
    cpu or gpu; `generation`, of decoders.
    """

    rounds: int
    steps: int
    turn_seconds: float
    threads: int
    compiled: bool
    profile: bool
    device: str
    generation: Generation | None


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens a second of each side, medians over rounds, and ratios to the eager peer's.

    **Attributes:** `ratio`, the median of those within rounds, with the lowest and the highest;
    `compiled_ratio` and `tuned_ratio`, the same to the compiled peer's and to the eager one's with
    our allocator, or None.
    """

    tokens_per_second: dict[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    compiled_ratio: tuple[float, float, float] | None = None
    tuned_ratio: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's measurement; speeds of training stand in the row itself, as a `Speed` has them.

    **Attributes:** `eval`, the forward pass; `generation`, of decoders, with its `shape`;
    `memory_mib`, the peak of a step, with ratios to the peer's as it is and
    (`tuned_memory_ratio`) with our allocator; `program_mib`, arguments and temporaries of our
    compiled step; `start`, seconds to the first step by side, ours with an empty cache of compiled
    programs and (`jpeft_warm`) a full one; `matrix_rates`, flops a second of one product by side,
    and the higher of them; `mfu`, by side, of that rate; `profile`, milliseconds of our step by
    kind; `note`, what could not be measured.
    """

    model: str
    method: str
    precision: str
    shape: str
    tokens_per_second: dict[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    compiled_ratio: tuple[float, float, float] | None
    eval: Speed
    generation: Speed | None
    generation_shape: str | None
    memory_mib: dict[str, float | None]
    memory_ratio: float | None
    program_mib: float | None
    start: dict[str, dict[str, float]]
    first_loss: dict[str, float]
    last_loss: dict[str, float]
    remat: bool = False
    flops_per_token: float | None = None
    matrix_flops_per_second: float | None = None
    matrix_rates: dict[str, float] | None = None
    mfu: dict[str, float] | None = None
    tuned_ratio: tuple[float, float, float] | None = None
    tuned_memory_ratio: float | None = None
    profile: dict[str, float] | None = None
    note: str = ""


def speed_of(speeds: Mapping[str, Sequence[float]]) -> Speed:
    """Medians, and ratios within rounds, of each side's tokens a second by round."""
    low, middle, high = ratios(speeds[OURS], speeds[EAGER])
    compiled, tuned = (
        ratios(speeds[OURS], speeds[side]) if side in speeds else None for side in (COMPILED, TUNED)
    )
    medians = {side: statistics.median(v) for side, v in speeds.items()}
    return Speed(medians, middle, low, high, compiled, tuned)


def peers_of(options: Options) -> tuple[str, ...]:
    """The peer as it is; on a CPU whose C library's allocator our commands set up, with that too;
    compiled, if so wanted.
    """
    tuned = options.device == "cpu" and bool(malloc_environment())
    return (EAGER, *((TUNED,) if tuned else ()), *((COMPILED,) if options.compiled else ()))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The lowest, the median and the highest of `ours / theirs` within rounds."""
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return found[0], statistics.median(found), found[-1]


def agree(losses: Mapping[str, float], precision: str) -> None:
    """**Raises:** `DisagreementError` where first losses differ, or are no numbers."""
    for side, loss in losses.items():
        # Not a number compares as false.
        if not abs(loss - losses[OURS]) <= TOLERANCE[precision]:
            raise DisagreementError(
                f"{side} and {OURS} do not compute the same thing: first losses {dict(losses)}"
            )


def job_of(case: Case, options: Options, directory: pathlib.Path, cache: pathlib.Path) -> Job:
    """What both sides of a row are told."""
    generation = options.generation
    return {
        **dataclasses.asdict(case),
        "directory": str(directory),
        "cache": str(cache),
        "threads": options.threads,
        "device": options.device,
        "generation": None if generation is None else dataclasses.asdict(generation),
    }


def measure(
    case: Case, options: Options, directory: pathlib.Path, tell: Callable[[str], None]
) -> Row:
    """A row, measured.

    **Arguments:** `directory`, the model's; `options.generation`, None for an encoder; `tell` is
    called with what is being done.

    **Raises:** `PeerError` where a side cannot run, or the sides disagree on the first loss.
    """
    with tempfile.TemporaryDirectory() as cache:
        job = job_of(case, options, directory, pathlib.Path(cache))
        own = products(directory)
        found = _timed(case, options, job, own, tell)
        memory, warm = _memory(options, job, found["memory"], tell)
    start = {OURS: found["start"][OURS], "jpeft_warm": warm}
    start |= {side: s for side, s in found["start"].items() if side != OURS}
    program = memory.pop("program")
    train: Speed = found["train"]
    flops, rate = step_flops(own, case.method, case.length), max(found["rates"].values())
    mfu = {side: x * flops / rate for side, x in train.tokens_per_second.items()}
    over = {side: _over(memory[OURS], memory.get(side)) for side in (EAGER, TUNED)}
    return Row(
        model=pathlib.Path(case.model).name,
        method=case.method,
        precision=case.precision,
        shape=case.shape,
        tokens_per_second=train.tokens_per_second,
        ratio=train.ratio,
        ratio_low=train.ratio_low,
        ratio_high=train.ratio_high,
        compiled_ratio=train.compiled_ratio,
        eval=found["eval"],
        generation=found["generation"],
        generation_shape=options.generation.shape if options.generation else None,
        memory_mib=memory,
        memory_ratio=over[EAGER],
        program_mib=program,
        start=start,
        first_loss=found["first"],
        last_loss=found["last"],
        remat=case.remat,
        flops_per_token=flops,
        matrix_flops_per_second=rate,
        matrix_rates=found["rates"],
        mfu=mfu,
        tuned_ratio=train.tuned_ratio,
        tuned_memory_ratio=over[TUNED],
        profile=found["profile"],
        note=found["note"],
    )


def _timed(
    case: Case, options: Options, job: Job, p: Products, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that is measured in turn, by one process a side."""
    notes: list[str] = []
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        starts: dict[str, dict[str, Any]] = {}
        for side in (OURS, *peers_of(options)):
            tell(f"{side} starts")
            worker = stack.enter_context(Worker(side, job))
            try:
                starts[side] = worker.ask("start")
            except PeerError as e:
                if side != COMPILED:
                    raise
                notes.append(f"not compiled: {e}")
                continue
            workers[side] = worker
        first = {side: answer["loss"] for side, answer in starts.items()}
        agree(first, case.precision)
        tokens, turns = case.batch * case.length, _Turns(workers, options, notes)
        tell("training")
        train = turns.speed("steps", tokens)
        memory: dict[str, Any] = {}
        if options.device == "gpu":  # its allocator tells; a host's needs a process of its own
            memory = {side: workers[side].ask("memory") for side in (OURS, EAGER)}
        # Near the steps in time, but not in the peak that was asked for.
        size = " ".join(map(str, rate_sizes(p, tokens, options.device)))
        rates = {side: workers[side].ask(f"rate {size}") for side in (OURS, EAGER)}
        tell("evaluation")
        evaluated = turns.speed("evals", tokens)
        generated = None
        if options.generation is not None:
            tell("generation")
            generated = turns.speed("generate", 0)
        profile = None
        if options.profile:
            tell("profile")
            profile = workers[OURS].ask("profile")["ms"]
    return {
        "start": {side: answer["start"] for side, answer in starts.items()},
        "first": first,
        "last": turns.losses,
        "train": train,
        "memory": memory,
        "eval": evaluated,
        "generation": generated,
        "profile": profile,
        "rates": {side: answer["flops_per_second"] for side, answer in rates.items()},
        "note": "; ".join(notes),
    }


class _Turns:
    """Sides that go in turn; one that fails where it is the compiled peer is left out from then."""

    def __init__(self, workers: dict[str, Worker], options: Options, notes: list[str]) -> None:
        self.workers, self.options, self.notes = workers, options, notes
        self.losses: dict[str, float] = {}

    def speed(self, what: str, tokens: int) -> Speed:
        """Tokens a second of `steps`, `evals` or `generate`.

        **Arguments:** `tokens`, of one step; a generation says them itself.
        """
        # The first turns warm caches and allocators, and tell how long a step takes.
        warm = self._round(what, 1)
        warm = self._round(what, 1) if what != "generate" else warm
        longest = max(answer["seconds"] for answer in warm.values())
        fit = int(self.options.turn_seconds / longest) if longest else self.options.steps
        count = min(self.options.steps, max(1, fit))
        rounds = [self._round(what, count) for _ in range(self.options.rounds)]
        speeds = {
            side: [r[side].get("tokens", tokens * count) / r[side]["seconds"] for r in rounds]
            for side in self.workers
        }
        if what == "steps":
            self.losses = {side: rounds[-1][side]["loss"] for side in self.workers}
        return speed_of(speeds)

    def _round(self, what: str, count: int) -> dict[str, dict[str, Any]]:
        command = what if what == "generate" else f"{what} {count}"
        answers: dict[str, dict[str, Any]] = {}
        for side, worker in list(self.workers.items()):
            try:
                answers[side] = worker.ask(command)
            except PeerError as e:
                if side != COMPILED:
                    raise
                self.notes.append(f"compiled, {what}: {e}")
                del self.workers[side]
        return answers


def _memory(
    options: Options, job: Job, measured: dict[str, Any], tell: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Each side's peak, where it was not `measured`, in a process alone; and our start again, now
    that its programs are in the cache.
    """
    answers, warm = dict(measured), {}
    for side in (OURS,) if measured else (OURS, *(s for s in peers_of(options) if s != COMPILED)):
        tell(f"{side}'s memory")
        with Worker(side, job) as worker:
            started = worker.ask("start")
            if side == OURS:
                warm = started["start"]
            if side not in measured:
                answers[side] = worker.ask("memory")
    memory = {side: answer["peak_mib"] for side, answer in answers.items()}
    return memory | {"program": answers[OURS]["program_mib"]}, warm


def _over(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours and other else None
