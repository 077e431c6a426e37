"""What the split writes: safetensors files, tensor by tensor, and the directories that hold them (`sliplm.bundle`)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch

from sliplm.bundle import FORMAT, MANIFEST, EdgeManifest, OpenManifest, TrustedManifest, sha256_file
from sliplm.errors import BundleError

_DTYPES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class TensorWriter:
    """Write a safetensors file one tensor at a time, in the order of `layout` (name -> (dtype, shape)).

    The format fixes every offset in a header, so shapes must be known first; tensors then stream through, and memory
    never holds more than one. Source: the safetensors format description (huggingface/safetensors, README).
    """

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = torch.empty((), dtype=dtype).element_size() * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._layout = layout
        self._names = iter(layout)
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append `tensor`, which must be the next one of the layout, with the dtype and shape announced there."""
        expected = next(self._names, None)
        if name != expected or self._layout[name] != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"tensor {name!r} does not match the layout, which expects {expected!r} next")
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self._put(flat.view(torch.uint8).numpy().data)

    def close(self) -> str:
        """Flush to disk and return the SHA-256 of the file. Raises ValueError if a tensor is missing."""
        if (missing := next(self._names, None)) is not None:
            raise ValueError(f"tensor {missing!r} was never written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abort(self) -> None:
        self._file.close()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that takes the name `path` when the block succeeds and vanishes when it does not.

    Where `path` is an empty directory it stays, as it may be a mount or the one we are in: the temporary one is inside,
    and its files take their places one by one.

    Raises:
        BundleError: `path` exists and is not an empty directory, or it or its parent cannot be written.
    """
    there = path.is_dir()
    try:
        if os.path.lexists(path) and (not there or any(path.iterdir())):
            raise BundleError(f"{path} already exists; choose another output directory or remove it first.")
        where = path if there else path.parent
        where.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=where))
    except OSError as error:
        raise BundleError(f"cannot write {'in' if there else 'beside'} {path}: {error.strerror}.") from error
    try:
        yield partial
        if there:
            for made in sorted(partial.iterdir()):
                made.rename(path / made.name)
            partial.rmdir()
        else:
            partial.chmod(0o755)
            partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def write_edge_manifest(
    directory: Path, shapes: list[tuple[int, int]], q_sha256: str, opened: OpenManifest | None = None
) -> str:
    """Write the edge's manifest; return the bundle digest (hex)."""
    write_json(directory / MANIFEST, EdgeManifest(FORMAT, shapes, q_sha256, opened))
    return sha256_file(directory / MANIFEST)


def write_trusted_manifest(directory: Path, edge_digest: str) -> None:
    files = {p.name: sha256_file(p) for p in sorted(directory.iterdir()) if p.is_file() and p.name != MANIFEST}
    write_json(directory / MANIFEST, TrustedManifest(FORMAT, edge_digest, files))
