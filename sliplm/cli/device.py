"""`slip device`: which machines may connect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.common import Json, emit

app = typer.Typer(no_args_is_help=True, help="Enrol and revoke edge machines.")

Authority = Annotated[Path, typer.Option("-b", "--bundle", help="DIR/trusted: its authority enrols devices.")]
Name = Annotated[str, typer.Argument(help="1 to 64 letters, digits, dots, dashes or underscores.")]


def _authority(bundle: Path) -> Path:
    from sliplm.bundle import MANIFEST
    from sliplm.errors import BundleError

    if not (bundle / MANIFEST).is_file():
        raise BundleError(f"{bundle} is not a bundle for the trusted side: it has no {MANIFEST}.")
    return bundle / "authority"


@app.command("add")
def device_add(
    name: Name,
    bundle: Authority,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="NAME.identity if absent.")] = None,
    days: Annotated[int, typer.Option(help="How long the certificate lasts.")] = 365,
    as_json: Json = False,
) -> None:
    """Enrol a machine: write the identity file it will present. The private key exists in that file only."""
    from sliplm.protocol import authority

    path = output or Path(f"{name}.identity")
    added = authority.add_device(_authority(bundle), name, path, days)
    emit(
        as_json,
        {"name": name, "identity": str(path), "fingerprint": added.fingerprint, "expires": added.expires.isoformat()},
        f"{path}: identity of {name!r}, valid until {added.expires:%Y-%m-%d}. Bring it there, and nowhere else.",
    )


@app.command("list")
def device_list(bundle: Authority, as_json: Json = False) -> None:
    """List the machines that were ever enrolled."""
    from sliplm.protocol import authority

    rows = [
        {
            "name": d.name,
            "state": "revoked" if d.revoked else "active" if d.active else "expired",
            "expires": d.expires.isoformat(),
            "fingerprint": d.fingerprint,
        }
        for d in authority.list_devices(_authority(bundle))
    ]
    lines = [f"{r['name']:24} {r['state']:8} until {r['expires'][:10]}  {r['fingerprint'][:16]}" for r in rows]
    emit(as_json, {"devices": rows}, "\n".join(lines) or "no device was ever enrolled")


@app.command("revoke")
def device_revoke(name: Name, bundle: Authority, as_json: Json = False) -> None:
    """Shut a machine out, at once and for good."""
    from sliplm.protocol import authority

    revoked = authority.revoke_device(_authority(bundle), name)
    emit(as_json, {"name": name, "fingerprint": revoked.fingerprint}, f"{name} is revoked.")
