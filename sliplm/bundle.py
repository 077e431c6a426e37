"""What each side loads: directories of safetensors files with a manifest of digests.

    DIR/edge/manifest.json      format version, the shape of every Q, SHA-256 of q.safetensors
    DIR/edge/q.safetensors      int8 tensors "0", "1", ...: the stacked planes of each group, (M, K)
    DIR/edge/open.safetensors   only if blocks are open: their tensors as the original has them, and its config.json
    DIR/trusted/manifest.json   format version, SHA-256 of every file, and of the edge's manifest
    DIR/trusted/...             a Transformers checkpoint (see `sliplm.trusted`), without Q

The digest of a bundle is the SHA-256 of its edge manifest: it names Q byte by byte, so two sides that agree on it hold
halves of the same split. Directories appear under their final name only when they are complete.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sliplm.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 4
LAST_FORMAT = 2  # of which the trusted bundle is still read, for a second split of the same weights
MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 24
Q_FILE = "q.safetensors"
OPEN_FILE, CONFIG_FILE = "open.safetensors", "config.json"
TRUSTED_FILES = {"config.json", "model.safetensors"}


class OpenManifest(msgspec.Struct, forbid_unknown_fields=True):
    """Blocks that the edge computes whole (`sliplm.open`): the `path` of the model's list of blocks, and the first and
    the last one of every run of them. `note` says to people what that gives away."""

    path: str
    runs: list[tuple[int, int]]
    weights_sha256: str
    config_sha256: str
    note: str


class EdgeManifest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    format: int
    shapes: list[tuple[int, int]]
    q_sha256: str
    open: OpenManifest | None = None


class TrustedManifest(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    edge_digest: str
    files: dict[str, str]


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    # One block for all, so that no allocator keeps more; a large one, because between two the thread waits for its turn
    # while others import.
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _read_manifest(directory: Path, kind: type[Any], side: str, oldest: int = FORMAT) -> tuple[Any, bytes]:
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{directory} is not a bundle for the {side}: it has no {MANIFEST}.") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    try:
        version = msgspec.json.decode(raw).get("format")
        if version not in range(oldest, FORMAT + 1):
            raise BundleError(_other_format(path, version))
        return msgspec.json.decode(raw, type=kind), raw
    except (ValueError, AttributeError, RecursionError) as error:  # msgspec's and Unicode's are ValueErrors
        raise BundleError(f"{path} is not a manifest for the {side} ({error}).") from None


def _other_format(path: Path, version: Any) -> str:
    found = f"{path} has format version {version}; this release reads version {FORMAT}"
    if not isinstance(version, int) or not LAST_FORMAT <= version < FORMAT:
        return f"{found}."
    # Another camouflage for the same weights would give them away to whoever holds both edge bundles.
    return f"{found}: split the model again with the same camouflage (slip split MODEL -o NEW --again OLD/trusted)."


def _check(path: Path, expected: str) -> None:
    try:
        actual = sha256_file(path)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError:  # a name that no file can have
        raise BundleError(f"{str(path)!a} is not the name of a file.") from None
    if actual != expected:
        raise BundleError(f"{path} is damaged: its SHA-256 is not the one in the manifest.")


class _Checking(threading.Thread):
    """`_check` in a thread of its own: computing a digest takes no interpreter."""

    def __init__(self, path: Path, expected: str) -> None:
        super().__init__(name="digest", daemon=True)
        self._arguments = path, expected
        self._failure: BaseException | None = BundleError(f"{path} was not checked.")
        self.start()

    def run(self) -> None:
        try:
            _check(*self._arguments)
            self._failure = None
        except BaseException as error:
            self._failure = error

    def wait(self) -> None:
        self.join()
        if self._failure is not None:
            raise self._failure


class QFile:
    """The integer matrices of a bundle, memory-mapped; `matrix(g)` is int8 of shape (M, K), read-only."""

    def __init__(self, path: Path, shapes: list[tuple[int, int]]) -> None:
        import numpy as np  # not before the digest is being computed, which takes longer

        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
            size = len(self._map) - 8 - length
            self._views = []
            self._starts = []
            for group, shape in enumerate(shapes):
                entry = header[str(group)]
                begin, end = entry["data_offsets"]
                if entry["dtype"] != "I8" or tuple(entry["shape"]) != shape or min(shape) < 1:
                    raise ValueError("shape")
                if not 0 <= begin <= end <= size or end - begin != shape[0] * shape[1]:
                    raise ValueError("offsets")
                view = np.frombuffer(self._map, np.int8, shape[0] * shape[1], 8 + length + begin)
                self._views.append(view.reshape(shape))
                self._starts.append(8 + length + begin)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise BundleError(f"{path} is damaged: its header does not match the manifest.") from None

    def matrix(self, group: int) -> NDArray[np.int8]:
        return self._views[group]

    def forget(self, group: int) -> None:
        """Let go of the memory that reading this matrix took; reading it again takes it again."""
        if hasattr(self._map, "madvise"):  # Linux and macOS
            first = self._starts[group] // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, self._starts[group] + self._views[group].nbytes - first)


class EdgeBundle:
    """Everything the edge has: Q and shapes.

    Attributes:
        digest: 32 bytes that name this split; both sides must agree on it.
        shapes: (M, K) of every group.
        opened: what is said of open blocks; None if there are none.
        directory: where its files are.
    """

    def __init__(
        self, directory: Path, digest: bytes, manifest: EdgeManifest, q: QFile, checking: list[_Checking]
    ) -> None:
        self.directory = directory
        self.digest = digest
        self.shapes = manifest.shapes
        self.opened = manifest.open
        self._q = q
        self._checking = checking

    @classmethod
    def open(cls, path: Path | str) -> EdgeBundle:
        """Open DIR/edge, checking every digest. Raises BundleError."""
        bundle = cls.opening(path)
        bundle.check()
        return bundle

    @classmethod
    def opening(cls, path: Path | str) -> EdgeBundle:
        """As `open`, while Q is still being read in a thread: nothing may leave it before `check` returns."""
        directory = Path(path)
        manifest, digest = read_edge_manifest(directory)
        expected = {Q_FILE: manifest.q_sha256}
        if manifest.open is not None:
            expected |= {OPEN_FILE: manifest.open.weights_sha256, CONFIG_FILE: manifest.open.config_sha256}
        checking = [_Checking(directory / name, digest) for name, digest in expected.items()]
        try:
            q = QFile(directory / Q_FILE, manifest.shapes)
        except BundleError:
            checking[0].wait()  # where the digest is wrong, too, this is what is said
            raise
        return cls(directory, digest, manifest, q, checking)

    def check(self) -> None:
        """Wait until the digests are known. Raises BundleError if one is not the manifest's."""
        for checking in self._checking:
            checking.wait()

    def matrix(self, group: int) -> NDArray[np.int8]:
        """Q of `group`: int8, (M, K), memory-mapped, read-only."""
        return self._q.matrix(group)

    def forget(self, group: int) -> None:
        """See QFile."""
        self._q.forget(group)


def read_edge_manifest(path: Path | str) -> tuple[EdgeManifest, bytes]:
    """The manifest of DIR/edge, and the split's digest; Q itself is not looked at. Raises BundleError."""
    manifest: EdgeManifest
    manifest, raw = _read_manifest(Path(path), EdgeManifest, "edge")
    return manifest, hashlib.sha256(raw).digest()


def tensor_sizes(path: Path) -> dict[str, int]:
    """The bytes of every tensor of a safetensors file, by its header alone. Raises BundleError."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        raise BundleError(f"{path} is damaged: its header cannot be read.") from None


def read_trusted_manifest(path: Path | str, oldest: int = FORMAT) -> TrustedManifest:
    """The manifest of DIR/trusted; the files themselves are not looked at. Raises BundleError, also for an edge's."""
    manifest: TrustedManifest
    manifest, _ = _read_manifest(Path(path), TrustedManifest, "trusted side", oldest)
    return manifest


def open_trusted(path: Path | str, oldest: int = FORMAT) -> TrustedManifest:
    """Check DIR/trusted, of the `oldest` format or a later one, every digest of it, and return its manifest. Raises
    BundleError."""
    directory = Path(path)
    manifest = read_trusted_manifest(directory, oldest)
    if missing := TRUSTED_FILES - manifest.files.keys():
        raise BundleError(f"{directory / MANIFEST} does not list {min(missing)}, so nothing vouches for it.")
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise BundleError(f"{directory / MANIFEST} names a file outside its directory.")
        _check(directory / name, expected)
    return manifest
