"""Tables of examples as tensors of bytes, which is what a checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pyarrow


def to_bytes(table: pyarrow.Table) -> Tensor:
    """A table as an Arrow stream: uint8 [bytes], the same for the same rows however they came."""
    import pyarrow as pa

    # without what datasets notes of how the table came about, which says nothing of the examples
    table = table.combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue().to_pybytes()), dtype=torch.uint8)


def from_bytes(stream: Tensor) -> pyarrow.Table:
    """The table that `to_bytes` was given."""
    import pyarrow as pa

    return pa.ipc.open_stream(stream.numpy().tobytes()).read_all()
