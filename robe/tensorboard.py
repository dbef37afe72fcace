"""The entries of RUN/metrics.jsonl as scalars for TensorBoard: what `train --tensorboard DIR` writes."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from robe.config import ConfigError
from robe.packages import extra
from robe.progress import Listener


def scalars(folder: Path) -> AbstractContextManager[Listener]:
    """Gives `told(entry)`, which writes the numbers of an entry, as `train/loss` and `validation/auc`.

    Raises ConfigError at once where tensorboardX is not installed, or the folder cannot be made.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ConfigError(f"--tensorboard needs tensorboardX: {extra('tensorboard')}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--tensorboard: {folder}: {error.strerror}; name another folder") from None
    return _writing(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[Listener]:
    # Not by its SummaryWriter, which writes from a thread of its own, so that a kill would lose entries.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    writer = None

    def told(entry: dict[str, Any]) -> None:
        nonlocal writer
        now = {"wall_time": time.time(), "step": entry["step"]}
        if writer is None:
            writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{entry['step']}")
            # A run that is resumed repeats the steps behind its checkpoint: TensorBoard drops what earlier
            # files have from here on.
            writer.write_event(Event(**now, session_log=SessionLog(status=SessionLog.START)))
        for name in entry.keys() - {"kind", "step"}:
            if isinstance(value := entry[name], int | float):
                writer.write_event(Event(**now, summary=scalar(f"{entry['kind']}/{name}", value)))
        writer.flush()

    try:
        yield told
    finally:
        if writer is not None:
            writer.close()
