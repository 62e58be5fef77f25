"""Training, evaluation, generation and memory beside HF PEFT: the same weights and batches.

Each side runs in a process of its own, and is told to go in turn, A B A B: while one works the
other sleeps. The ratio is taken within each pair of turns, so that a machine that slows down
slows both. Before any timing the two must agree on the loss of the first batch.

HF PEFT has no bottleneck adapters: the peer's row `adapter` is plain torch modules on the model of
transformers. Its `qlora` is bitsandbytes' 4-bit layers. On a CPU this package's commands set up the
C library's allocator, which serves the peer as well: it runs as its users start it, and once more
with that setting. Memory on a CPU is what a step adds to the process after its imports, by
processes of their own. On a GPU it is the most that the allocator gave out, which for JAX counts
loading too.

Without arguments: the rows of `--preset cpu`, on a GPU of `--preset gpu`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from experiments.common import peer_cases, peer_model, peer_shown
from experiments.common.command import command, ready
from experiments.common.peer_cases import DECODERS, Case, Generation, Method, Numbers, Preset
from experiments.common.peer_measure import Options, Row, measure
from experiments.common.peers import DisagreementError, PeerError, environment
from experiments.common.report import describe_machine, versions, write_json

# A preset of a GPU is done in ten minutes: no row is begun after this many.
GPU_MINUTES = 8.0
Choice = Literal["auto", "yes", "no"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare; models, methods, precisions and shapes make rows of every combination."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--model",))] = ()
    """`minilm`, a directory, or random weights of a shape: `shape` (MiniLM's), `gpt2`, or a name of
    experiments/common/named.py such as `llama-3.2-1b`. Encoders classify, decoders foretell."""
    methods: Annotated[tuple[Method, ...], tyro.conf.arg(aliases=("--method",))] = ()
    """What is trained: everything; LoRA of query and value, or of all linear layers of the blocks;
    Houlsby's adapters; a prefix; LoRA on a base in 4 bits. Without it `lora`."""
    precisions: Annotated[tuple[Numbers, ...], tyro.conf.arg(aliases=("--precision",))] = ()
    """Of weights and computing; what a method adds is fp32. Without it `fp32`."""
    shapes: tuple[str, ...] = ()
    """Batch and length, as BATCHxLENGTH. Without it 32x64, for decoders 8x128."""
    preset: Preset | None = None
    """Rows that are chosen for a machine, where no model, method, precision or shape is given."""
    generation: str | None = "8x64"
    """Decoders generate so many rows of so many tokens, as ROWSxTOKENS; None for no generation."""
    prompt: int = 32
    """Tokens of the prompts that are generated from."""
    rounds: int = 7
    """Pairs of turns."""
    steps: int = 5
    """The most training steps a turn."""
    turn_seconds: float = 4.0
    """A turn of several steps takes no longer."""
    threads: int = 0
    """Threads of each side; 0 is all cores."""
    remat: Choice = "auto"
    """Both sides forget activations and compute them again: as the preset has it, yes, or no."""
    compiled: Choice = "auto"
    """Run the peer a second time under torch.compile: on a GPU alone, yes, or no."""
    profile: bool = False
    """Show where the time of this library's step goes."""
    minutes: float | None = None
    """Begin no row after so many minutes. Without it the preset of a GPU ends in ten."""
    out: pathlib.Path | None = None
    """Folder for `result.json`, written after every row, and the plot."""
    overwrite: bool = False
    """Throw away the result that --out holds."""


def cases(config: Config, device: str) -> list[Case]:
    """The rows of a configuration.

    **Arguments:** `device`, cpu or gpu.

    **Raises:** `ValueError` for a preset with rows of one's own, or a shape that is none;
    `ModelError` for an unknown model.
    """
    own = (config.models, config.methods, config.precisions, config.shapes)
    if not any(own):
        chosen: Preset = config.preset or ("gpu" if device == "gpu" else "cpu")
        rows = peer_cases.preset(chosen)
        if config.remat != "auto":
            rows = [dataclasses.replace(r, remat=config.remat == "yes") for r in rows]
        return rows
    if config.preset is not None:
        raise ValueError(
            f"--preset {config.preset} has rows of its own: leave out --models, --methods, "
            "--precisions and --shapes, or the preset"
        )
    rows: list[Case] = []
    for model in config.models or ("minilm",):
        decoder = peer_cases.check_model(model) in DECODERS
        shapes = config.shapes or (("8x128",) if decoder else ("32x64",))
        methods, precisions = config.methods or ("lora",), config.precisions or ("fp32",)
        rows += peer_cases.product([model], methods, precisions, shapes, config.remat == "yes")
    return rows


def main(config: Config, console: Console | None = None) -> list[Row]:
    """Run every row, print the tables, and write `result.json` and the plot.

    **Raises:** `ValueError`, `ModelError`; `PeerError` at the end, where a row's sides disagree or
    no row could be measured.
    """
    begun, console = time.perf_counter(), console or Console()
    # The sides share the card, with this process too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if min(config.rounds, config.steps, config.prompt) < 1:
        raise ValueError("--rounds, --steps and --prompt are at least 1")
    machine = describe_machine()
    device = "gpu" if machine["platform"] in ("gpu", "cuda") else "cpu"
    planned = cases(config, device)
    kinds = {c.model: peer_cases.check_model(c.model) for c in planned}
    generation = None
    if config.generation is not None:
        generation = Generation(*peer_cases.pair("--generation", config.generation), config.prompt)
    for case in planned:
        peer_cases.check(case, kinds, generation)
    ready(config.out, config.overwrite)
    limit = config.minutes
    if limit is None and planned == peer_cases.preset("gpu"):
        limit = GPU_MINUTES
    compiled = config.compiled == "yes" or (config.compiled == "auto" and device == "gpu")
    options = Options(
        config.rounds,
        config.steps,
        config.turn_seconds,
        config.threads,
        compiled,
        config.profile,
        device,
        generation,
    )
    result: dict[str, Any] = {
        "config": dataclasses.asdict(config) | {"out": None},
        "finished": False,
        "rows": [],
        "left_out": [],
        "machine": machine,
        "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
    }
    load = result["load_before"] = os.getloadavg()[0]
    if load > 0.5:
        console.print(
            f"the machine is at work already (load {load:.1f}): threads that wait for one another "
            "lose by it, and the sides not alike, so that ratios hold for this load alone"
        )
    rows: list[Row] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in planned:
            left = ""
            if limit is not None and time.perf_counter() - begun > 60 * limit:
                left = f"not begun, as {limit:g} minutes were over"
            else:
                of = options if kinds[case.model] in DECODERS else without_generation(options)
                try:
                    rows.append(_row(case, of, pathlib.Path(scratch), console))
                except PeerError as e:
                    left = str(e)
                    if isinstance(e, DisagreementError):
                        wrong.append(f"{case.name}: {e}")
            if left:
                console.print(f"{case.name} is left out: {left}", highlight=False)
                result["left_out"].append(dataclasses.asdict(case) | {"reason": left})
            result["rows"] = [dataclasses.asdict(r) for r in rows]
            _save(config.out, result)
            if rows:  # a run that is cut has its plot
                peer_shown.draw(config.out, rows, peer_shown.source_of(result), Console(quiet=True))
    result |= {"finished": True, "seconds": time.perf_counter() - begun}
    _save(config.out, result)
    for shown in peer_shown.tables(rows):
        console.print(shown)
    if rows:
        peer_shown.draw(config.out, rows, peer_shown.source_of(result), console)
    if wrong or not rows:
        raise PeerError("; ".join(wrong) or "no row could be measured, for the reasons above")
    return rows


def _row(case: Case, options: Options, scratch: pathlib.Path, console: Console) -> Row:
    """Write the model where it is not there yet, and measure."""
    name = pathlib.Path(case.model).resolve().as_posix().replace("/", "_")
    folder = scratch / f"{name}-{case.precision}"
    with console.status(case.name) as status:

        def tell(what: str) -> None:
            status.update(f"{case.name}: {what}")

        if not folder.exists():
            tell("the model is written")
            about = environment(options.device, 0, tuned=True)
            peer_model.write(case.model, case.precision, folder, about)
        row = measure(case, options, folder, tell)
    note = f" ({row.note})" if row.note else ""
    alike = f", {row.tuned_ratio[1]:.2f} with {peer_shown.ALIKE}" if row.tuned_ratio else ""
    told = f"{case.name}: {row.ratio:.2f} times as fast{alike}{note}"
    console.print(told, highlight=False, soft_wrap=True)
    return row


def without_generation(options: Options) -> Options:
    """Those of an encoder."""
    return dataclasses.replace(options, generation=None)


def _save(out: pathlib.Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        write_json(out / "result.json", result)


if __name__ == "__main__":
    sys.exit(command("bench_peers", Config, main, __doc__))
