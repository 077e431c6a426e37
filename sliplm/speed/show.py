"""The figures of `slip bench` as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sliplm.attacks.report import require_plots

__all__ = ["plot", "require_plots", "tables"]


def tables(result: dict[str, Any], console: Console) -> None:
    """Print `result`, as `speed.bench.bench` returns it."""
    console.print(f"kernels: {result['kernels']}; torch threads: {result['threads']}", markup=False)
    for r in result["results"]:
        console.print(f"\n{_title(r)}, rank {r['rank']}", style="bold", markup=False)
        if "streams" in r:
            _leverage(r, console)
            continue
        if "drafts" in r:
            _drafts(r, console)
            continue
        table = Table("decoding", "tokens/s", "ms a token", "p10 - p90", "x bf16", box=None)
        for name, d in r["decode"].items():
            spread = f"{d['ms_p10']:.1f} - {d['ms_p90']:.1f}"
            table.add_row(name, f"{d['tokens_per_second']:.1f}", f"{d['ms']:.1f}", spread, f"{d['times_bf16']:.2f}")
        for name, speed in r.get("peers", {}).items():
            times = f"{speed / r['decode']['bf16']['tokens_per_second']:.2f}"
            table.add_row(name, f"{speed:.1f}", f"{1e3 / speed:.1f}", "", times)
        console.print(table)
        if r["prefill"]:
            table = Table("prompt", "tokens/s", "x bf16", box=None)
            for name, p in r["prefill"].items():
                table.add_row(name, f"{p['tokens_per_second']:.0f}", f"{p['times_bf16']:.2f}")
            console.print(table)
        t, m, a = r["per_token"], r["memory"], r["multiply_adds"]
        lines = [
            f"per decoded token: {t['round_trips']:.0f} round trips, {t['bytes_sent'] / 1e3:.0f} kB to the edge, "
            f"{t['bytes_received'] / 1e3:.0f} kB back",
            f"CPU per token: trusted {t['cpu_ms_trusted']:.1f} ms, edge {t['cpu_ms_edge']:.1f} ms; unprotected "
            f"{t['cpu_ms_unprotected']:.1f} ms (trusted / unprotected {t['trusted_share_of_cpu']:.0%})",
            f"multiply-adds of the trusted side: {a['trusted_share']:.2%} of the unprotected model's, and "
            f"{a['check_share']:.2%} for the check; of the edge {a['edge']:.0f} x",
            f"peak memory: trusted {m['trusted'] / 1e6:.0f} MB, edge {m['edge'] / 1e6:.0f} MB "
            f"(bundle {m['edge_bundle'] / 1e6:.0f} MB), unprotected {m['bf16'] / 1e6:.0f} MB",
        ]
        lines += [f"tls / {name}: {times:.2f}" for name, times in r.get("times_peers", {}).items()]
        if g := r.get("growth"):
            lines.append(
                f"memory after {g['tokens']} more tokens, against that after a tenth of them: trusted "
                f"{g['trusted'] / 1e6:+.1f} MB, edge {g['edge'] / 1e6:+.1f} MB"
            )
        for where, stages in r["exchange_us"].items():
            times = ", ".join(f"{name} {us:.0f}" for name, us in stages.items())
            lines.append(f"an exchange, {where}, us: {times}")
        console.print("\n".join(lines), markup=False)


def _title(r: dict[str, Any]) -> str:
    return f"{r['model']}{' (one decoder block)' if r['block'] else ''}, planes {r['planes']}"


def _drafts(r: dict[str, Any], console: Console) -> None:
    table = Table(
        "answer", "tokens a pass", "wrong guesses a token", "ms a token without", "with", "x", "text", box=None
    )
    for row in r["drafts"]:
        times = f"{row['ms_without'] / row['ms_with']:.2f}"
        guessed = f"{row['tokens_per_pass']:.2f}", f"{row['rejected_per_token']:.2f}"
        spent = f"{row['ms_without']:.1f}", f"{row['ms_with']:.1f}"
        table.add_row(row["text"], *guessed, *spent, times, "the same" if row["same"] else "differs")
    console.print(table)


def _leverage(r: dict[str, Any], console: Console) -> None:
    columns = ("trusted CPU ms a token", "pads", "by", "unprotected, bf16", "fp32")
    table = Table("streams", "leverage", *columns, box=None)
    for row in r["streams"]:
        names = ("trusted_cpu_ms", "pads_cpu_ms", "bf16_cpu_ms", "fp32_cpu_ms")
        trusted, pads, *unprotected = (f"{row[name]:.2f}" for name in names)
        table.add_row(str(row["streams"]), f"{row['leverage']:.2f}", trusted, pads, row["pads"], *unprotected)
    console.print(table)
    t = r["trusted"]
    console.print(
        f"trusted side: {t['resident'] / 1e6:.0f} MB resident, of which {t['anonymous'] / 1e6:.0f} MB are no file's, "
        f"{t['peak'] / 1e6:.0f} MB at most; the model in bf16 has {t['bf16'] / 1e6:.0f} MB\n"
        f"trusted bundle: {t['bundle'] / 1e6:.0f} MB, loaded in {t['load_seconds']:.1f} s",
        markup=False,
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a picture of `result` to `path`: decoding speeds, and where an exchange's time goes. Raises SlipError."""
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(result["results"]), figsize=(4.2 * len(result["results"]), 7), squeeze=False)
    for column, r in enumerate(result["results"]):
        top, bottom = axes[0][column], axes[1][column]
        names = list(r["decode"])
        top.bar(names, [r["decode"][n]["tokens_per_second"] for n in names], color="tab:blue")
        top.set_title(_title(r))
        top.set_ylabel("decoded tokens/s")
        top.tick_params(axis="x", rotation=30)
        stages = r["exchange_us"]["tls"]
        bottom.barh(list(stages), list(stages.values()), color="tab:orange")
        bottom.invert_yaxis()
        bottom.set_xlabel("microseconds of an exchange over TLS")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
