"""Event files of TensorBoard, in its own format; each event is in the file once it is added.

TensorBoard's own writer has a thread and a queue for each file, and each flush waits for them: that
was most of what an epoch cost the driver. Between events, no file is open.
"""

import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tfkd_ray.settings.files import append_whole

_COUNT = itertools.count()


class EventFileWriter:
    """A new event file in a folder, which is created if needed."""

    def __init__(self, folder: Path | str, filename_suffix: str = "") -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        # TensorBoard reads the files of a folder in the order of their names
        count = f"{next(_COUNT):08d}"
        self._path = self._folder / f"{name}.{os.getpid()}.{count}{filename_suffix}"
        self._records = RecordWriter(self)
        about = event_pb2.SourceMetadata(writer="tfkd_ray")
        first = {"file_version": "brain.Event:2", "source_metadata": about}
        self.add_event(event_pb2.Event(wall_time=time.time(), **first))

    def get_logdir(self) -> Path:
        """Return the folder."""
        return self._folder

    def add_event(self, event: event_pb2.Event) -> None:
        """Append an event."""
        self._records.write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """Append the bytes of a record."""
        kind = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self._path, kind, 0o666)
        try:
            append_whole(handle, record)
        finally:
            os.close(handle)

    def close(self) -> None:
        """End the file; repeating it changes nothing."""
