"""What a model is called: never nothing, whatever its bundle's directory is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from link_fakes import FakeEngine, serving, working

from sliplm.errors import BundleError
from sliplm.naming import model_name
from sliplm.protocol import frames


def bundle(directory: Path, name: object = None) -> Path:
    directory.mkdir(parents=True)
    stored = {} if name is None else {"name": name}
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"rank": 16, **stored}}))
    return directory


def test_what_is_given_wins_over_what_is_stored_and_that_over_the_directory(tmp_path: Path) -> None:
    named = bundle(tmp_path / "mistral" / "trusted", "my-model")
    assert model_name(named, "org/other model") == "org/other model"
    assert model_name(named) == "my-model"
    assert model_name(bundle(tmp_path / "llama" / "trusted")) == "llama"
    assert model_name(bundle(tmp_path / "qwen")) == "qwen"


@pytest.mark.parametrize("nothing", ["", " \n", 7, None])
def test_an_empty_name_is_none(nothing: object, tmp_path: Path) -> None:
    assert model_name(bundle(tmp_path / "llama" / "trusted", nothing)) == "llama"


@pytest.mark.parametrize(("place", "name"), [("/trusted", "trusted"), ("/bundle", "bundle"), ("/", frames.NAMELESS)])
def test_directories_at_the_root(place: str, name: str) -> None:
    assert model_name(Path(place)) == name


def test_the_shipped_containers_have_a_name() -> None:
    compose = yaml.safe_load((Path(__file__).parents[1] / "deploy" / "compose.yaml").read_text())
    trusted = compose["services"]["trusted"]
    inside = trusted["command"][1]
    assert model_name(Path(inside)) == "model"
    # Beside it the edge bundle, where `slip trusted` looks for what makes its pads; nobody there may change it.
    assert trusted["volumes"] == [f"./trusted:{inside}", f"./edge:{Path(inside).parent / 'edge'}:ro"]


def test_a_name_that_edges_would_not_see_word_for_word(tmp_path: Path) -> None:
    for name in ("", " ", "a ", "a\tb", "ä" * 65):
        with pytest.raises(BundleError, match="a model's name has"):
            model_name(tmp_path, name)
    long = model_name(bundle(tmp_path / "trusted", "ä" * 65))
    assert long == "ä" * 64


def test_an_edge_that_gets_an_empty_name_is_connected(home: Path, identity: Path) -> None:
    class Nameless(FakeEngine):
        def model_name(self) -> str:
            return ""

    with serving(home, Nameless()) as server, working(server, identity) as worker:
        assert worker.model_name == frames.NAMELESS
    old = frames.pack_welcome(frames.Welcome(frames.VERSIONS[1], bytes(32), "x"))[:-1]  # nothing after the digest
    assert frames.parse_welcome(old).model_name == frames.NAMELESS
