"""GLUE from the Hugging Face hub, for runs without `--data`."""

from __future__ import annotations

from typing import Any

from experiments.common.readers import DataError, Row
from experiments.common.tasks import Dataset, Task

REPOSITORY = "nyu-mll/glue"


def fetch_glue(task: Task) -> Dataset:
    """The task's train and validation rows.

    **Raises:** `DataError` when the hub cannot be reached, or pyarrow is not installed.
    """
    validation = "validation_matched" if task.name == "mnli" else "validation"
    parts = [_rows(task, split) for split in ("train", validation)]
    return Dataset(task, parts[0], parts[1], f"{REPOSITORY} on the hub, train and {validation}")


def _rows(task: Task, split: str) -> list[Row]:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(
            "reading GLUE from the hub needs pyarrow (the extra jpeft[hub]); or pass --data with a "
            "folder that has the task's files"
        ) from e
    from huggingface_hub import hf_hub_download

    name = f"{task.name}/{split}-00000-of-00001.parquet"
    try:
        path = hf_hub_download(REPOSITORY, name, repo_type="dataset")
    except Exception as e:  # the hub's client raises many kinds, none of them of use to the user
        raise DataError(
            f"{task.name} could not be fetched from the hub ({type(e).__name__}); pass --data with "
            "a folder that has the task's files"
        ) from e
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    texts = [next(n for n in names if n in columns) for names in task.text]
    return [
        Row(tuple(columns[t][i] for t in texts), label) for i, label in enumerate(columns["label"])
    ]
