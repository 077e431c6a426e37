"""`slip device`: which machines may connect, and what they may use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from sliplm.cli.common import Json, RegistryUrl, emit

if TYPE_CHECKING:
    from sliplm.registry import Device, Limits, Registry

app = typer.Typer(no_args_is_help=True, help="Enrol edges and helpers, limit them, and shut them out.")

Authority = Annotated[Path, typer.Option("-b", "--bundle", help="DIR/trusted: its authority enrols devices.")]
Name = Annotated[str, typer.Argument(help="1 to 64 letters, digits, dots, dashes or underscores.")]
Concurrent = Annotated[int | None, typer.Option(min=0, help="Requests that generate at once; 0 for any number.")]
PerMinute = Annotated[int | None, typer.Option(min=0, help="Tokens a minute, prompts included; 0 without limit.")]
Daily = Annotated[int | None, typer.Option(min=0, help="Tokens a day (UTC), prompts included; 0 without limit.")]


@app.command()
def add(
    name: Name,
    bundle: Authority,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="NAME.identity if absent.")] = None,
    days: Annotated[int, typer.Option(help="How long the certificate lasts.")] = 365,
    concurrent: Concurrent = None,
    tokens_per_minute: PerMinute = None,
    daily_tokens: Daily = None,
    edge: Annotated[
        bool, typer.Option("--edge", help="It may be an edge: so is every device without --helper.")
    ] = False,
    helper: Annotated[
        bool, typer.Option("--helper", help="It may make one-time pads for other parties' edges.")
    ] = False,
    party: Annotated[str | None, typer.Option(help="Who controls it, for good; NAME if absent.")] = None,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Enrol a machine: write the identity file it will present. The private key exists in that file only.

    Limits that are not given are the server's. A party's helpers make no pads for edges of the same party: give all
    devices that could pool what they see the same one.
    """
    from sliplm.registry import Limits, authority

    path = output or Path(f"{name}.identity")
    limits = Limits(concurrent, tokens_per_minute, daily_tokens)
    added = authority.add_device(
        _authority(bundle),
        name,
        path,
        days,
        limits=limits,
        registry=registry,
        party=party,
        edge=edge or not helper,
        helper=helper,
    )
    emit(
        as_json,
        {
            "name": name,
            **_roles(added),
            "identity": str(path),
            "fingerprint": added.fingerprint,
            "expires": added.expires.isoformat(),
        },
        f"{path}: identity of {name!r}, {added.roles} of party {added.party!r}, valid until {added.expires:%Y-%m-%d}. "
        "Bring it there, and nowhere else.",
    )


@app.command("list")
def list_(bundle: Authority, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """List the machines that were ever enrolled."""
    with _open(bundle, registry) as opened:
        devices = opened.devices.all()
    lines = [
        f"{d.name:24} {d.state:9} until {d.expires:%Y-%m-%d}  {d.fingerprint[:16]}  {d.roles} of {d.party}"
        for d in devices
    ]
    emit(as_json, {"devices": [_summary(d) for d in devices]}, "\n".join(lines) or "no device was ever enrolled")


@app.command()
def show(name: Name, bundle: Authority, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """Show a machine's certificate, state, party, limits, usage and history."""
    from sliplm.registry.devices import now
    from sliplm.registry.usage import midnight

    with _open(bundle, registry) as opened:
        device = opened.devices.get(name)
        events = opened.devices.events(device)
        today = opened.usage.totals(device, midnight(now()))
        total = opened.usage.totals(device)
    value = {
        **_summary(device),
        "added": device.added.isoformat(),
        "reason": device.reason,
        "limits": _limits(device.limits),
        "usage": {"today": today._asdict(), "total": total._asdict()},
        "events": [{"time": e.time.isoformat(), "kind": e.kind, "text": e.text} for e in events],
    }
    why = f": {device.reason}" if device.suspended else ""
    lines = [
        f"{device.name}: {device.state}{why}",
        f"certificate   {device.fingerprint}, {device.added:%Y-%m-%d} to {device.expires:%Y-%m-%d}",
        f"may be        {device.roles}, of party {device.party!r}",
        f"limits        {_describe(device.limits)}",
        *(
            f"used {when:8} {t.requests} requests, {t.prompt_tokens} tokens in, {t.completion_tokens} out"
            for when, t in (("today", today), ("in all", total))
        ),
        *(f"{e.time:%Y-%m-%d %H:%M:%S}Z  {e.kind} {e.text}".rstrip() for e in events),
    ]
    emit(as_json, value, "\n".join(lines))


@app.command()
def limit(
    name: Name,
    bundle: Authority,
    concurrent: Concurrent = None,
    tokens_per_minute: PerMinute = None,
    daily_tokens: Daily = None,
    reset: Annotated[bool, typer.Option("--reset", help="First go back to the server's limits.")] = False,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Change what a machine may use, from its next request on. Limits that are not given stay."""
    from sliplm.registry import Limits

    with _open(bundle, registry) as opened:
        device = opened.devices.get(name)
        given = Limits(concurrent, tokens_per_minute, daily_tokens)
        device = opened.devices.limit(name, given if reset else given.over(device.limits))
    emit(as_json, {"name": name, "limits": _limits(device.limits)}, f"{name}: {_describe(device.limits)}")


@app.command()
def revoke(name: Name, bundle: Authority, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """Shut a machine out, at once and for good."""
    with _open(bundle, registry) as opened:
        revoked = opened.devices.revoke(name)
    emit(as_json, {"name": name, "fingerprint": revoked.fingerprint}, f"{name} is revoked.")


@app.command()
def resume(name: Name, bundle: Authority, registry: RegistryUrl = None, as_json: Json = False) -> None:
    """Let a machine in again that was suspended because an answer of its failed the check."""
    with _open(bundle, registry) as opened:
        opened.devices.resume(name)
    emit(as_json, {"name": name}, f"{name} may connect again.")


def _authority(bundle: Path) -> Path:
    """Raises BundleError for anything but a trusted bundle: an authority's key must never lie in an edge's."""
    from sliplm.bundle import read_trusted_manifest

    read_trusted_manifest(bundle)
    return bundle / "authority"


def _open(bundle: Path, registry: str | None) -> Registry:
    from sliplm.registry import authority

    return authority.open_registry(_authority(bundle), registry)


def _summary(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        **_roles(device),
        "state": device.state,
        "expires": device.expires.isoformat(),
        "fingerprint": device.fingerprint,
    }


def _roles(device: Device) -> dict[str, Any]:
    return {"party": device.party, "edge": device.edge, "helper": device.helper}


def _limits(limits: Limits) -> dict[str, int | None]:
    return msgspec.structs.asdict(limits)


def _describe(limits: Limits) -> str:
    own = [
        f"{name.replace('_', ' ')} {value or 'unlimited'}"
        for name, value in _limits(limits).items()
        if value is not None
    ]
    return ", ".join(own) or "the server's"
