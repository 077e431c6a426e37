"""`sliplm.protect` on any module, the Python API, and layers at the edge of what numbers can do."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from counting import exchanges
from torch import nn
from zoo import RANK, Cnn, mlp, relative_error

import sliplm
from sliplm.errors import NumericsError, UnsupportedModelError
from sliplm.protocol.messages import GenerateRequest
from sliplm.registry import authority


@pytest.mark.parametrize(("make", "shape"), [(mlp, (64, 33)), (Cnn, (4, 3, 32, 32))])
def test_plain_modules(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        want = module(x)
    assert sliplm.protect(module, x, rank=RANK) is module
    assert relative_error(want, module(x)) < 1e-4
    assert not [n for n, p in module.named_parameters() if p.dim() >= 2 and "depthwise" not in n]


CONVOLUTIONS = [
    (nn.Conv1d(16, 40, 5, stride=2, padding=3, dilation=2), (3, 16, 50)),
    (nn.Conv1d(16, 40, 4, padding="same", padding_mode="replicate"), (3, 16, 50)),
    (nn.Conv2d(12, 40, (3, 2), (2, 1), "valid", (1, 2), groups=2, padding_mode="reflect"), (2, 12, 11, 13)),
    (nn.Conv2d(12, 40, (3, 2), 1, "same", (1, 2), groups=2, bias=False), (2, 12, 11, 13)),
    (nn.Conv2d(12, 40, 3, 1, 2, padding_mode="circular"), (12, 11, 13)),
    (nn.Conv2d(12, 40, 4, 4), (2, 12, 8, 8)),
    (nn.Conv3d(6, 40, (3, 2, 1), (2, 1, 1), (1, 0, 0)), (2, 6, 7, 8, 9)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_convolutions(conv: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = conv(x)
    module = sliplm.protect(conv, rank=RANK)
    got, groups = exchanges(module, x)
    assert got.shape == want.shape and got.is_contiguous()
    assert relative_error(want, got) < 1e-4
    assert sorted(set(groups)) == list(range(getattr(conv, "groups", 1)))
    half = module(x.half())
    assert half.dtype == torch.float16 and relative_error(want, half) < 5e-3


def test_depthwise_convolutions_stay_on_the_trusted_side() -> None:
    module = sliplm.protect(Cnn(), torch.randn(1, 3, 8, 8), rank=RANK)
    assert type(module.depthwise) is nn.Conv2d
    assert len(module.slip.shapes) == 5  # stem, pointwise, two halves of the grouped one, head


class Branches(nn.Module):
    """Two layers that read one tensor, a layer used twice under two names, and control flow that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 40), nn.Linear(32, 40)
        self.again = nn.ModuleDict({"left": self.left})
        self.last = nn.Linear(40, 32)

    def forward(self, x: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
        y = self.left(x) * self.right(x)
        if float(y.detach().sum()) > 0 or flip:
            y = -y
        return self.again["left"](self.last(y))


def test_example_inputs_show_what_can_share_a_round_trip() -> None:
    x = torch.randn(5, 32)
    torch.manual_seed(0)
    original = Branches()
    for inputs, trips in ((None, 4), (x, 4), ((x,), 4), ({"x": x, "flip": True}, 4), ("nonsense", 4)):
        module = Branches()
        module.load_state_dict(original.state_dict())
        got, groups = exchanges(sliplm.protect(module, inputs, rank=RANK), x)
        assert relative_error(original(x).detach(), got) < 1e-3
        assert len(groups) == trips  # `left` is called with different company, so it shares nothing
        assert module.again["left"] is module.left
    steady = nn.ModuleDict({"a": nn.Linear(32, 40), "b": nn.Linear(32, 40)})
    steady.forward = lambda x: steady["a"](x) + steady["b"](x)  # type: ignore[method-assign]
    assert len(exchanges(sliplm.protect(steady, x, rank=RANK), x)[1]) == 1


def test_transformers_models_need_no_inputs() -> None:
    config = transformers.GPT2Config(vocab_size=99, n_embd=60, n_layer=1, n_head=6, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        want = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    protected = sliplm.protect(model, rank=RANK)
    assert len(protected.slip.shapes) == 5
    with torch.inference_mode():
        assert relative_error(want, protected(ids).logits) < 1e-3
        assert torch.equal(protected.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), tokens)


class Spelled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Adapted(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.adapter(input)


def test_a_linear_layer_may_spell_its_forward_out_but_not_change_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 30)
    for bias in (True, False):
        layer = Spelled(30, 40, bias)
        want = layer(x).detach()
        module = sliplm.protect(layer, x, rank=RANK)
        assert len(module.slip.shapes) == 1 and relative_error(want, module(x)) < 1e-3
    for kind in (Scaled, Adapted):
        with pytest.raises(UnsupportedModelError, match=kind.__name__):
            sliplm.protect(nn.Sequential(nn.Linear(30, 40), kind(40, 40)), x, rank=RANK)


def test_one_plane_is_coarser() -> None:
    x = torch.randn(50, 33)
    errors = []
    for planes in (1, 2):
        torch.manual_seed(0)
        module = mlp()
        want = module(x).detach()
        errors.append(relative_error(want, sliplm.protect(module, x, rank=RANK, planes=planes)(x)))
    assert 20 * errors[1] < errors[0] < 0.05


def test_protecting_twice_and_bad_weights_are_refused() -> None:
    module = sliplm.protect(mlp())
    with pytest.raises(UnsupportedModelError, match="already"):
        sliplm.protect(module)
    module = mlp()
    module[2].weight.data[3, 4] = torch.inf
    with pytest.raises(UnsupportedModelError, match=r"2\.weight holds values"):
        sliplm.protect(module)
    assert type(module[0]) is nn.Linear  # as it was
    module = nn.Sequential(nn.Linear(1 << 16, 20))
    with pytest.raises(UnsupportedModelError, match=r"0 reads 65536 features"):
        sliplm.protect(module)


@pytest.mark.parametrize("columns", [17, 64, 101, 512, 577, 1031, 4099])
@torch.no_grad()
def test_inputs_at_the_edge_of_what_numbers_can_do(columns: int) -> None:
    torch.manual_seed(columns)
    layer = nn.Linear(columns, 90)
    reference = nn.Linear(columns, 90).double()
    reference.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    module = sliplm.protect(layer)
    outlier = torch.randn(8, columns)
    outlier[torch.arange(8), torch.randint(columns, (8,))] = 1e4
    cases = {
        "plain": torch.randn(8, columns),
        "outliers": outlier,
        "zero": torch.zeros(2, columns),
        "tiny": torch.randn(3, columns) * 1e-30,
        "huge": torch.randn(3, columns) * 1e30,
        "one of many is zero": torch.randn(3, columns) * torch.tensor([[1.0], [0.0], [1.0]]),
    }
    for name, x in cases.items():
        # One row's error is relative to its own size: rows of a batch do not share a scale.
        want, got = reference(x.double()) - reference.bias, module(x).double() - reference.bias
        size = want.abs().amax(1, keepdim=True) + 1e-3 * float(reference.bias.abs().max())
        assert float(((want - got).abs() / size).max()) < 1e-3, name
    assert torch.equal(module(torch.zeros(1, columns))[0], reference.bias.float())
    for dtype in (torch.float16, torch.bfloat16):
        got = module(cases["plain"].to(dtype))
        assert got.dtype == dtype
        assert relative_error(reference(cases["plain"].to(dtype).double()).float(), got) < 5e-3
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NumericsError, match="the input of 0 "):
            module(torch.full((1, columns), bad))


@pytest.mark.slow
def test_importing_the_package_or_an_edge_is_light() -> None:
    code = (
        "import sys, sliplm; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules);"
        "sliplm.Edge; assert 'transformers' not in sys.modules;"
        "assert {'protect', 'split_model', 'Trusted', 'Edge'} <= set(dir(sliplm));"
        "import sliplm.split.planes, sliplm.trusted.protect;"
        "assert callable(sliplm.split_model) and callable(sliplm.protect)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sliplm.nonsense


@pytest.mark.slow
def test_both_sides_from_python(tiny: Path, tmp_path: Path) -> None:
    summary = sliplm.split_model(str(tiny), tmp_path / "out")
    authority.add_device(tmp_path / "out" / "trusted" / "authority", "laptop", tmp_path / "identity", 1)
    with sliplm.Trusted(tmp_path / "out" / "trusted", stock=0) as trusted:
        assert summary.digest == trusted.model.slip.digest.hex()
        serving = threading.Thread(target=trusted.serve_forever)
        serving.start()
        edge = sliplm.Edge(tmp_path / "out" / "edge", trusted.address, tmp_path / "identity")
        working = threading.Thread(target=edge.run)
        working.start()
        try:
            assert edge.connected.wait(20)
            text = "".join(chunk.text for chunk in edge.generate(GenerateRequest(prompt="Hello", max_tokens=5)))
            ids = trusted.tokenizer("Hello", return_tensors="pt")
            trusted.model.slip.attach(tmp_path / "out" / "edge")
            want = trusted.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 5:]
        finally:
            edge.stop()
            working.join(10)
    serving.join(10)
    assert text == trusted.tokenizer.decode(want, skip_special_tokens=True).rstrip("\ufffd")  # half characters are cut
