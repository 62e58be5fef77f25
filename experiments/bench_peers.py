"""Training speed beside HF PEFT: the same weights, batches, method and machine, in one run.

Each side runs in a process of its own, and is told to go in turn, A B A B: while one works the
other sleeps. The ratio is taken within each pair of turns, so that a machine that slows down
slows both. Before any timing the two must agree on the loss of the first batch.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
from typing import Literal

import rich
import tyro
from rich.table import Table

from experiments.common.peers import PeerError, Worker, write_model
from experiments.common.report import describe_machine, versions, write_json

SIDES = ("jpeft", "peft")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    The defaults are MiniLM's shape, LoRA of rank 8 on query and value, fp32, without dropout.
    """

    model: str = "minilm"
    """`minilm`, a directory with a BERT, a hub name, or `shape` for random weights of MiniLM's."""
    method: Literal["lora", "full"] = "lora"
    """What is trained: low-rank updates of query and value with the head, or everything."""
    shapes: tuple[str, ...] = ("32x64", "32x128")
    """Batch and length of each row, as BATCHxLENGTH."""
    rank: int = 8
    """LoRA's rank."""
    rounds: int = 7
    """Pairs of turns."""
    steps: int = 5
    """Training steps a turn."""
    threads: int = 0
    """Threads of each side; 0 is all cores."""
    out: pathlib.Path | None = None
    """Folder for `result.json`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape's measurement; speeds are medians over rounds, in tokens a second."""

    shape: str
    tokens_per_second: dict[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    first_step_seconds: dict[str, float]
    peak_rss_mib: dict[str, float]
    first_loss: dict[str, float]
    last_loss: dict[str, float]


def measure(config: Config, directory: pathlib.Path, shape: str) -> Row:
    """Both sides on one shape, in turn.

    **Raises:** `PeerError` when the two disagree on the first loss by more than 1e-3.
    """
    batch, length = (int(n) for n in shape.split("x"))
    job = {
        "directory": str(directory),
        "method": config.method,
        "rank": config.rank,
        "batch": batch,
        "length": length,
        "steps": config.steps,
        "threads": config.threads,
    }
    with Worker("jpeft", job) as ours, Worker("peft", job) as theirs:
        workers = dict(zip(SIDES, (ours, theirs), strict=True))
        first = {side: w.ask("first") for side, w in workers.items()}
        losses = {side: first[side]["loss"] for side in SIDES}
        if abs(losses["jpeft"] - losses["peft"]) > 1e-3:
            raise PeerError(f"the two sides do not compute the same thing: first losses {losses}")
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        last: dict[str, float] = {}
        for round_ in range(config.rounds + 1):
            for side, worker in workers.items():
                answer = worker.ask("steps")
                last[side] = answer["loss"]
                if round_:  # the first turn warms caches and allocators
                    speeds[side].append(batch * length * config.steps / answer["seconds"])
        memory = {side: w.ask("memory")["peak_rss_mib"] for side, w in workers.items()}
    ratios = sorted(a / b for a, b in zip(speeds["jpeft"], speeds["peft"], strict=True))
    return Row(
        shape=shape,
        tokens_per_second={side: statistics.median(v) for side, v in speeds.items()},
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        first_step_seconds={side: first[side]["seconds"] for side in SIDES},
        peak_rss_mib=memory,
        first_loss=losses,
        last_loss=last,
    )


def table(rows: list[Row]) -> Table:
    """The rows as a terminal table."""
    out = Table(title="training speed, tokens/s (median), and the ratio within pairs of turns")
    for name in ("batch x length", *SIDES, "ratio", "lowest", "highest", "peak MiB (RSS)"):
        out.add_column(name, justify="right")
    for r in rows:
        out.add_row(
            r.shape,
            *(f"{r.tokens_per_second[s]:,.0f}" for s in SIDES),
            f"{r.ratio:.2f}",
            f"{r.ratio_low:.2f}",
            f"{r.ratio_high:.2f}",
            " / ".join(f"{r.peak_rss_mib[s]:,.0f}" for s in SIDES),
        )
    return out


def main(config: Config) -> list[Row]:
    """Run every shape, print the table and write `result.json`."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_model(config.model, pathlib.Path(scratch))
        rows = [measure(config, directory, shape) for shape in config.shapes]
    rich.print(table(rows))
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(
            config.out / "result.json",
            {
                "config": dataclasses.asdict(config),
                "rows": [dataclasses.asdict(r) for r in rows],
                "machine": describe_machine(),
                "versions": versions("torch", "transformers", "peft"),
            },
        )
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except PeerError as e:
        sys.exit(f"bench_peers: {e}")
