"""Bundles: every damage is found, and two halves of different splits never meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sliplm import bundle
from sliplm.errors import BundleError, SlipError
from sliplm.split import writer


@pytest.fixture
def copy(tiny_split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_split, tmp_path / "copy"))


def test_tensor_writer_writes_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "b": torch.randint(-128, 128, (4, 7), dtype=torch.int8),
        "view": torch.arange(12.0).reshape(3, 4).T,
    }
    made = writer.TensorWriter(tmp_path / "x", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        made.write(name, tensor)
    assert made.close() == bundle.sha256_file(tmp_path / "x")
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "x").items())


def test_tensor_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    made = writer.TensorWriter(tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.int8, (1,))})
    for name, tensor in [("b", torch.zeros(1, dtype=torch.int8)), ("a", torch.zeros(3))]:
        with pytest.raises(ValueError):
            made.write(name, tensor)
    with pytest.raises(ValueError):
        writer.TensorWriter(tmp_path / "y", {"a": (torch.float32, (2,))}).close()


def test_edge_matrices_are_read_only_and_exact(tiny_split: Path) -> None:
    edge = bundle.EdgeBundle.open(tiny_split / "edge")
    stored = load_file(tiny_split / "edge" / "q.safetensors")
    assert len(edge.digest) == 32
    for g, shape in enumerate(edge.shapes):
        assert edge.matrix(g).shape == tuple(shape)
        assert np.array_equal(edge.matrix(g), stored[str(g)].numpy())
        with pytest.raises(ValueError):
            edge.matrix(g)[0, 0] = 1


@pytest.mark.parametrize("side", ["edge", "trusted"])
def test_every_flipped_bit_is_found(side: str, copy: Path) -> None:
    def open_it() -> None:
        if side == "edge":
            bundle.EdgeBundle.open(copy / "edge")
        else:
            bundle.open_trusted(copy / "trusted")

    open_it()
    rng = np.random.default_rng()
    for path in sorted((copy / side).iterdir()):
        if path.name == "manifest.json":
            continue  # the digest of the edge's manifest is what the two sides compare
        raw = path.read_bytes()
        at = int(rng.integers(len(raw)))
        path.unlink()  # q.safetensors is a hard link in the original
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :])
        with pytest.raises(BundleError, match="damaged"):
            open_it()
        path.write_bytes(raw[:-1])
        with pytest.raises(BundleError, match="damaged"):
            open_it()
        path.unlink()
        with pytest.raises(BundleError, match="cannot read"):
            open_it()
        path.write_bytes(raw)
    open_it()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 2, "shapes": "x", "q_sha256": ""}']
)
def test_malformed_manifests(text: str, copy: Path) -> None:
    for side in ("edge", "trusted"):
        (copy / side / "manifest.json").write_text(text)
    for reader, side in ((bundle.EdgeBundle.open, "edge"), (bundle.open_trusted, "trusted")):
        with pytest.raises(BundleError):
            reader(copy / side)


def test_a_bundle_of_an_older_format_is_to_be_split_again_with_the_same_camouflage(copy: Path) -> None:
    for side, read in (("edge", bundle.EdgeBundle.open), ("trusted", bundle.open_trusted)):
        path = copy / side / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
        with pytest.raises(BundleError, match=r"format version 2; .* with the same camouflage .* --again OLD/trusted"):
            read(copy / side)


def test_another_format_version_is_named(copy: Path) -> None:
    path = copy / "edge" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(BundleError, match="version 99"):
        bundle.EdgeBundle.open(copy / "edge")


def test_shapes_that_do_not_fit_the_file(copy: Path) -> None:
    path = copy / "edge" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shapes"][0] = [manifest["shapes"][0][1], manifest["shapes"][0][0]]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="header"):
        bundle.EdgeBundle.open(copy / "edge")


def q_file(directory: Path, header: bytes, body: bytes = bytes(64)) -> Path:
    path = directory / "q.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path


def entry(shape: Any = (2, 2), offsets: Any = (0, 4), dtype: Any = "I8") -> bytes:
    return json.dumps({"0": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "shape"),
    [
        (entry(offsets=[10**30, 10**30 + 4]), (2, 2)),
        (entry([10**20, 10**20], [0, 10**40]), (10**20, 10**20)),
        (entry([-2, -2]), (-2, -2)),
        (entry(offsets=[-8, -4]), (2, 2)),  # a view of the header
        (entry(offsets=[62, 66]), (2, 2)),
        (entry(offsets=[4, 0]), (2, 2)),
        (entry(offsets=[0.0, 4.0]), (2, 2)),
        (entry(offsets="ab"), (2, 2)),
        (entry([0, 4], [0, 0]), (0, 4)),
        (b"[" * 200_000, (2, 2)),
        (b'{"0": null}', (2, 2)),
        (b"[]", (2, 2)),
        (b"\xff", (2, 2)),
    ],
)
def test_malformed_headers(header: bytes, shape: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="damaged"):
        bundle.QFile(q_file(tmp_path, header), [shape])


NUMBERS = st.integers() | st.integers(-70, 70) | st.floats() | st.text(max_size=2) | st.none()
HEADERS = (
    st.binary(max_size=60)
    | st.recursive(NUMBERS, lambda x: st.lists(x) | st.dictionaries(st.sampled_from("012"), x)).map(
        lambda x: json.dumps(x).encode()
    )
    | st.builds(entry, st.lists(NUMBERS, max_size=3), st.lists(NUMBERS, max_size=3), st.sampled_from(["I8", "U8", 3]))
    | st.builds(entry, st.just([2, 2]), (st.integers(-70, 70) | st.integers()).map(lambda begin: [begin, begin + 4]))
)


@settings(max_examples=300, deadline=None)
@given(
    header=HEADERS,
    shape=st.just((2, 2)) | st.tuples(st.integers(-2, 8), st.integers(-2, 8)),
    claimed=st.none() | st.binary(max_size=8),
)
def test_any_header_opens_or_is_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, shape: tuple[int, int], claimed: bytes | None
) -> None:
    path = q_file(tmp_path_factory.getbasetemp(), header)
    if claimed is not None:
        path.write_bytes(claimed + path.read_bytes()[len(claimed) :])
    try:
        matrix = bundle.QFile(path, [shape]).matrix(0)
    except BundleError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert matrix.shape == shape and not matrix.any()  # all zeros: the body, and not the header


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe{", b"[" * 100_000, b'{"format": 2, "shapes": [[1' + b"0" * 5000 + b", 1]]}"]
)
def test_manifests_of_garbage(raw: bytes, copy: Path) -> None:
    for reader, side in ((bundle.EdgeBundle.open, "edge"), (bundle.open_trusted, "trusted")):
        (copy / side / "manifest.json").write_bytes(raw)
        with pytest.raises(BundleError):
            reader(copy / side)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_trusted_manifest_vouches_for_what_is_loaded(name: str, copy: Path) -> None:
    path = copy / "trusted" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"does not list {name}"):
        bundle.open_trusted(copy / "trusted")


@pytest.mark.parametrize("name", ["", "..", "../x", "\0", "x" * 300])
def test_a_trusted_manifest_names_files_only(name: str, copy: Path) -> None:
    path = copy / "trusted" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError):
        bundle.open_trusted(copy / "trusted")


def test_the_wrong_side_and_no_bundle_at_all(tiny_split: Path, tmp_path: Path) -> None:
    for path in (tiny_split / "trusted", tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError):
            bundle.EdgeBundle.open(path)
    with pytest.raises(BundleError):
        bundle.open_trusted(tiny_split / "edge")


def test_a_damaged_trusted_bundle_does_not_load(copy: Path) -> None:
    path = copy / "trusted" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(SlipError, match="damaged"):
        transformers.AutoModelForCausalLM.from_pretrained(copy / "trusted")


def test_the_trusted_directory_is_private(tiny_split: Path) -> None:
    assert (tiny_split / "trusted").stat().st_mode & 0o077 == 0


def test_new_directory_is_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writer.new_directory(tmp_path / "x") as partial:
        (partial / "half").write_text("written")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with writer.new_directory(tmp_path / "deep" / "x") as partial:
        (partial / "whole").write_text("written")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]


def test_an_empty_directory_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the working directory, or a mount, which nothing can take the place of."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = (tmp_path / "here").stat().st_ino
    with pytest.raises(RuntimeError), writer.new_directory(Path()) as partial:
        (partial / "half").write_text("written")
        raise RuntimeError
    assert list(Path().iterdir()) == []
    with writer.new_directory(Path()) as partial:
        (partial / "whole").mkdir()
    assert [str(p) for p in Path().iterdir()] == ["whole"] and (tmp_path / "here").stat().st_ino == before


@pytest.mark.parametrize("name", ["link", "file"])
def test_what_cannot_become_a_directory_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="already exists"), writer.new_directory(tmp_path / name):
        raise AssertionError("never reached")
