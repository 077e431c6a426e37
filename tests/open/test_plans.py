"""Every plan on models of several architectures: the same text as the original's, and every weight where it belongs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import attached
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from typer.testing import CliRunner
from zoo import FAMILIES, build

from sliplm.bundle import EdgeBundle, sha256_file
from sliplm.cli import app
from sliplm.errors import BundleError, NumericsError, SlipError, UnsupportedModelError
from sliplm.evaluate.report import edge_only
from sliplm.open import model as open_model
from sliplm.split.inspect import inspect
from sliplm.split.model import Options, Summary, split_model
from sliplm.split.plan import gives_away, read_plan
from sliplm.split.source import load_whole

PLANS = {"first:2": [(2, 3)], "last:1": [(0, 2)], "blocks:1,3": [(0, 0), (2, 2)], "trusted:2": [(2, 3)]}
ARCHITECTURES = ["Llama", "Gemma 3", "GPT-2 (Conv1D)", "OPT", "GPT-NeoX (parallel blocks)", "Mixtral"]
BLOCK = "model.layers."
TIE = 2e-3  # of the spread of logits; two planes are off by up to 4e-4 in these


def four(name: str) -> Any:
    """The family's tiny model with four blocks."""
    config = FAMILIES[name].make()
    settings = config.to_dict()
    settings |= {key: 4 for key in ("num_hidden_layers", "n_layer") if key in settings}
    if settings.get("layer_types"):
        settings["layer_types"] = (config.layer_types * 2)[:4]
    return build(replace(FAMILIES[name], make=lambda: type(config)(**settings)))


def greedy(model: Any, ids: torch.Tensor, count: int = 30, **more: Any) -> torch.Tensor:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count} | more
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def same_text(original: Any, protected: Any, ids: torch.Tensor, count: int = 30) -> bool:
    """Up to the first tie, in models of random weights: two tokens that the original's logits set apart by less than
    rounding does, or two experts between which its router hesitates, after which all is different."""
    want, got = greedy(original, ids, count)[0], greedy(protected, ids, count)[0]
    differ = (want != got).nonzero()
    if not len(differ):
        return True
    first = int(differ[0])
    with torch.no_grad():
        routed = {"output_router_logits": True} if hasattr(original.config, "num_experts_per_tok") else {}
        out = original(want[None, :first], **routed)
    for router in out.router_logits if routed else ():
        best = router.sort(descending=True).values
        chosen = original.config.num_experts_per_tok
        if bool((best[:, chosen - 1] - best[:, chosen] < TIE * router.std()).any()):
            return True
    logits = out.logits[0, -1]
    return float(logits[want[first]] - logits[got[first]]) < TIE * float(logits.std())


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return attached(AutoModelForCausalLM.from_pretrained(directory / "trusted").eval())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("four") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def splits(checkpoint: Path) -> dict[str, Path]:
    made = {}
    for plan in PLANS:
        made[plan] = checkpoint.parent / plan.replace(":", "")
        split_model(str(checkpoint), made[plan], Options(rank=4, plan=plan))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_text_is_the_original_s(name: str, plan: str, tmp_path: Path) -> None:
    """Longer than a sliding window, of prompts of several lengths, one after the other."""
    original = four(name)
    original.save_pretrained(tmp_path / "model")
    split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=4, plan=plan))
    protected = load(tmp_path / "out")
    for length in (1, 7, 20):
        ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(length))
        assert same_text(original, protected, ids)
    assert protected.slip.runs == len(PLANS[plan]) and not protected.slip.default_link._blocks.requests


@pytest.mark.slow
def test_the_real_model_gives_the_original_s_text(smollm2: str, tmp_path: Path) -> None:
    original = load_whole(smollm2)
    from transformers import AutoTokenizer

    for plan in ("first:1", "trusted:2"):
        split_model(smollm2, tmp_path / plan, Options(plan=plan), check=False)
        tokenizer, protected = AutoTokenizer.from_pretrained(tmp_path / plan / "trusted"), load(tmp_path / plan)
        for prompt in ("The capital of France is", "def fibonacci(n):", "Water boils at"):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            assert same_text(original, protected, ids, 24)


@pytest.mark.parametrize("plan", PLANS)
def test_every_weight_is_in_its_place(plan: str, checkpoint: Path, splits: dict[str, Path]) -> None:
    original = load_file(checkpoint / "model.safetensors")
    edge, trusted = splits[plan] / "edge", splits[plan] / "trusted"
    opened = {i for first, last in PLANS[plan] for i in range(first, last + 1)}
    prefixes = tuple(f"{BLOCK}{i}." for i in opened)
    given, kept = load_file(edge / "open.safetensors"), load_file(trusted / "model.safetensors")
    assert given.keys() == {name for name in original if name.startswith(prefixes)}
    assert all(torch.equal(given[name], original[name]) and given[name].dtype == original[name].dtype for name in given)
    guards = [name for name, tensor in kept.items() if not tensor.numel()]
    assert len(guards) == 1 and not {n for n in kept if n.startswith(prefixes)} - set(guards)
    masked = set(range(4)) - opened if not plan.startswith("trusted") else set()
    for i in set(range(4)) - opened:
        name = f"{BLOCK}{i}.mlp.down_proj"
        assert (f"{name}.factor_a" in kept) == (i in masked)
        assert i in masked or torch.equal(kept[f"{name}.weight"], original[f"{name}.weight"])
    manifest, _ = EdgeBundle.open(edge), None
    assert len(manifest.shapes) == 4 * len(masked) and manifest.opened is not None
    assert manifest.opened.runs == PLANS[plan] and manifest.opened.note == gives_away(PLANS[plan])
    # No weight of another block, in whatever form, where only its integers may be.
    with safe_open(edge / "q.safetensors", "pt") as q:
        assert all(q.get_slice(name).get_dtype() == "I8" for name in q.keys())  # noqa: SIM118
    assert sorted(p.name for p in edge.iterdir()) == [
        "config.json",
        "manifest.json",
        "open.safetensors",
        "q.safetensors",
    ]


def test_the_plan_says_where_every_group_is(splits: dict[str, Path]) -> None:
    settings = json.loads((splits["blocks:1,3"] / "trusted" / "config.json").read_text())["quantization_config"]
    places = {of.members[0]: of.place for of in read_plan(settings)}
    assert [places[f"{BLOCK}{i}.mlp.down_proj"] for i in range(4)] == ["open", "masked", "open", "masked"]
    assert places["lm_head"] == "trusted"


def test_without_open_blocks_nothing_new_is_written(tiny_split: Path) -> None:
    assert sorted(p.name for p in (tiny_split / "edge").iterdir()) == ["manifest.json", "q.safetensors"]
    manifest = json.loads((tiny_split / "edge" / "manifest.json").read_text())
    assert list(manifest) == ["format", "shapes", "q_sha256"] and manifest["format"] == 4
    settings = json.loads((tiny_split / "trusted" / "config.json").read_text())["quantization_config"]
    assert "open" not in settings


@pytest.mark.parametrize("file", ["open.safetensors", "config.json"])
def test_a_damaged_file_of_the_edge_is_named(file: str, splits: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    edge = Path(shutil.copytree(splits["first:2"] / "edge", tmp_path / "edge"))
    data = bytearray((edge / file).read_bytes())
    data[-3] ^= 1
    (edge / file).write_bytes(data)
    with pytest.raises(BundleError, match=f"{file} is damaged"):
        EdgeBundle.open(edge)


def test_a_block_that_is_missing_is_named(splits: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    edge = Path(shutil.copytree(splits["first:2"] / "edge", tmp_path / "edge"))
    tensors = load_file(edge / "open.safetensors")
    del tensors[f"{BLOCK}2.mlp.up_proj.weight"]
    save_file(tensors, edge / "open.safetensors")
    manifest = json.loads((edge / "manifest.json").read_text())
    manifest["open"]["weights_sha256"] = sha256_file(edge / "open.safetensors")
    (edge / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"lacks model.layers.2.mlp.up_proj.weight"):
        open_model.load(EdgeBundle.open(edge))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"plan": "first:5"}, "names 5 blocks, and this model has 4"),
        ({"plan": "blocks:4"}, "names block 4"),
        ({"plan": "trusted:4"}, "the edge nothing to do"),
        ({"plan": "middle:2"}, "is no plan"),
        ({"plan": "first:1", "base": "x"}, "with --base all blocks are masked"),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(
    options: dict[str, str], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlipError, match=says):
        split_model(str(checkpoint), tmp_path / "out", Options(rank=4, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "T5", "ViT"])
def test_models_without_decoder_blocks_take_no_plan(name: str, tmp_path: Path) -> None:
    build(FAMILIES[name]).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks: only the plan all"):
        split_model(str(tmp_path / "model"), tmp_path / "out", Options(rank=4, plan="first:1"))


def test_another_plan_of_the_same_weights_cannot_use_the_camouflage_again(
    checkpoint: Path, splits: Any, tmp_path: Path
) -> None:
    def again(plan: str) -> Summary:
        first = splits["first:2"] / "trusted"
        return split_model(str(checkpoint), tmp_path / plan.replace(":", ""), Options(rank=4, plan=plan, again=first))

    assert again("first:2").open
    with pytest.raises(BundleError, match="not a split of this model with this plan"):
        again("last:2")


def test_a_plan_may_come_from_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """What `decide` returns is done, whatever the text means."""
    asked: list[Any] = []

    def decide(plan: str, count: int) -> Any:
        asked.append((plan, count))
        return ["trusted", "masked", "open", "open"]

    split_model(str(checkpoint), tmp_path / "out", Options(rank=4, plan="auto:9rt"), decide=decide)
    ids = torch.arange(20, 27)[None]
    assert asked == [("auto:9rt", 4)]
    assert same_text(load_whole(str(checkpoint)), load(tmp_path / "out"), ids)


# --- what cannot be done with a cache whose other part is on the edge


@pytest.fixture(scope="module")
def protected(splits: dict[str, Path]) -> Any:
    return load(splits["first:2"])


IDS = torch.arange(30, 38)[None]


def test_several_texts_at_once_are_those_of_each(protected: Any, checkpoint: Path) -> None:
    ids = torch.cat([IDS, IDS.flip(1), IDS + 9])
    original = load_whole(str(checkpoint))
    assert same_text(original, protected, ids)
    with torch.no_grad():
        want, got = original(ids).logits, protected(ids, use_cache=False).logits
    assert float((want - got).norm() / want.norm()) < 1e-3


def test_a_long_text_goes_in_parts(protected: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.trusted.runtime.STATE_ROWS", 5)
    ids = torch.arange(30, 53)[None]
    original = load_whole(str(checkpoint))
    assert same_text(original, protected, ids)
    with torch.no_grad():
        want, got = original(ids).logits, protected(ids, use_cache=False).logits
    assert float((want - got).norm() / want.norm()) < 1e-3
    assert not protected.slip.default_link._blocks.requests


def test_padding_is_refused(protected: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    with pytest.raises(UnsupportedModelError, match="cannot be padded"):
        protected.generate(IDS, attention_mask=mask, max_new_tokens=2)


def test_beams_are_refused(protected: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot become more or fewer|cannot be reordered"):
        greedy(protected, IDS, 8, num_beams=3)


def test_a_copied_cache_is_refused(protected: Any) -> None:
    with torch.no_grad():
        cache = protected(IDS, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        copy.deepcopy(cache)


def test_a_cache_can_be_cut(protected: Any) -> None:
    with torch.no_grad():
        whole = protected(IDS, use_cache=False).logits[0, -1]
        cache = protected(IDS, use_cache=True).past_key_values
        protected(IDS[:, :3], past_key_values=cache)
        cache.crop(-4)
        again = protected(IDS[:, -1:], past_key_values=cache).logits[0, -1]
    assert cache.get_seq_length() == IDS.shape[1] and torch.allclose(whole, again, atol=1e-3)


def test_hidden_states_that_are_not_finite_are_refused(protected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = protected.slip.default_link._blocks
    monkeypatch.setattr(blocks, "compute", lambda run, request, start, x, keep: x * float("nan"))
    with pytest.raises(NumericsError, match="not finite"), torch.no_grad():
        protected(IDS)


def test_in_half_precision_hidden_states_travel_in_half(splits: dict[str, Path], checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    half = attached(AutoModelForCausalLM.from_pretrained(splits["trusted:2"] / "trusted", dtype=torch.bfloat16))
    with torch.no_grad():
        want, got = load_whole(str(checkpoint))(IDS).logits, half(IDS).logits
    assert half.slip.counters.sent == 2 * 60 * IDS.shape[1]
    assert float((want - got.float()).norm() / want.norm()) < 0.05


# --- what an owner and a thief see


def test_inspect_says_what_is_open(splits: dict[str, Path]) -> None:
    whole = inspect(splits["first:2"])
    assert whole["open"] == {"runs": [[2, 3]], "note": gives_away([(2, 3)])}
    places = [group["place"] for group in whole["groups"]]
    assert places.count("masked") == 8 and places.count("open") == 8 and places.count("trusted") == 1
    assert [g["number"] for g in whole["groups"] if "number" in g] == list(range(8))
    for half in ("edge", "trusted"):
        assert inspect(splits["first:2"] / half)["open"] == whole["open"]
    shown = CliRunner().invoke(app, ["inspect", str(splits["first:2"])]).stdout
    assert "blocks 2 to 3 are open: the edge has these weights in plain" in shown


def test_split_says_it_too(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["split", str(checkpoint), "-o", str(tmp_path / "out"), "--plan", "last:3"])
    assert done.exit_code == 0 and "block 0 is open: the edge has these weights in plain" in done.stdout


def test_the_thief_has_open_blocks_and_never_trusted_ones(checkpoint: Path, splits: dict[str, Path]) -> None:
    original = load_file(checkpoint / "model.safetensors")
    name = "mlp.down_proj.weight"
    first, trusted = (edge_only(splits[plan]).state_dict() for plan in ("first:2", "trusted:2"))
    for state in (first, trusted):
        assert torch.equal(state[f"{BLOCK}3.{name}"], original[f"{BLOCK}3.{name}"])
        assert not torch.allclose(state[f"{BLOCK}0.{name}"], original[f"{BLOCK}0.{name}"])
    guess, truth = trusted[f"{BLOCK}0.{name}"].flatten(), original[f"{BLOCK}0.{name}"].flatten()
    assert abs(float(torch.corrcoef(torch.stack([guess, truth]))[0, 1])) < 0.05


@pytest.mark.slow
def test_the_attack_s_report_calls_open_blocks_unprotected(
    checkpoint: Path, splits: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    arguments = ["attack", str(splits["first:2"]), "--reference", str(checkpoint), "--method", "subspace", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--report", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    (found,) = json.loads(done.stdout)["verdict"].values()
    assert found[0].startswith("Not protected: blocks 2 to 3 are open") and "Not protected: " in page.read_text()
    none = CliRunner().invoke(app, ["attack", str(splits["trusted:2"]), "--reference", str(checkpoint)])
    assert none.exit_code and isinstance(none.exception, SlipError) and "nothing to attack" in str(none.exception)
