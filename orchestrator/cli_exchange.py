"""Commands that take adapters in, let them out, and say who vouches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.terminal import JsonFlag, ModelOption, err, out, print_json, workspace_here

keys_app = typer.Typer(help="Keys that sign, and keys that are trusted.", no_args_is_help=True)

KeyOption = Annotated[str | None, typer.Option("--key", help="Which key signs.")]


def import_(
    folder: Path,
    name: Annotated[str, typer.Option("--name", help="The name that the version gets.")],
    base: Annotated[str | None, typer.Option("--base", help="Where the base model is.")] = None,
    labels: Annotated[str, typer.Option(help="Of a sequence classifier, in order: a,b.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a PEFT adapter folder a version."""
    from dataclasses import asdict

    from orchestrator import service

    names = labels.split(",") if labels else []
    made = service.import_adapter(workspace_here(), folder, name, base, names)
    if as_json:
        print_json(asdict(made))
        return
    out.print(f"{made.name}  {made.version}", highlight=False)
    if made.parent:
        out.print(f"the export of {made.parent[:12]}", style="dim", highlight=False)
    if made.kept:
        out.print(f"kept in PEFT's own format: {made.kept}", highlight=False, markup=False)


def export(  # noqa: PLR0913  (one option each)
    ref: str,
    folder: Path,
    model: ModelOption = None,
    sign: Annotated[str | None, typer.Option("--sign", help="Key that signs it.")] = None,
    to: Annotated[
        Literal["lora"] | None, typer.Option("--as", help="Convert it, and say what that keeps.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="With --as lora: the most that a layer gets."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge-into-base", help="Write a whole model, the adapter in it.")
    ] = False,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of a whole model; bf16 if not said.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of a whole model: a quantised base may grow.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a version as a PEFT folder, or as a whole model."""
    from orchestrator import report, service, views

    if rank is not None and to is None:
        raise typer.BadParameter("--rank is the rank of --as lora; give both, or neither")
    if merge and to is not None:
        raise typer.BadParameter("--as lora writes an adapter, --merge-into-base none; choose one")
    if not merge and (dtype is not None or dequantize):
        raise typer.BadParameter("--dtype and --dequantize are for --merge-into-base; give it too")
    wanted = service.AsLora(rank) if to else None
    whole = service.IntoBase(dtype or "bf16", dequantize) if merge else None
    made = service.export(workspace_here(), ref, folder, model, sign, whole or wanted)
    if as_json:
        print_json(views.export_json(made))
        return
    for file in made.files:
        out.print(str(file), highlight=False)
    if made.converted:
        out.print(report.conversion_table(made.converted))
    if made.merged:
        out.print(report.agreement_line(made.merged), highlight=False)


def verify(
    folder: Path,
    key: Annotated[
        list[str],
        typer.Option("--key", help="Public key, one of which must have signed; needs no home."),
    ] = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Check an exported folder against its manifest and its signatures; needs no database."""
    from dataclasses import asdict

    from orchestrator.signing import verify_folder
    from orchestrator.workspace import home_folder

    checked, problems = verify_folder(home_folder(), folder, key)
    if as_json:
        signer = checked.signer and asdict(checked.signer)
        facts = {"version": checked.version, "manifest": checked.facts, "signer": signer}
        print_json({**facts, "problems": problems})
    elif not problems:
        out.print(f"{folder} is version {checked.version}", highlight=False, markup=False)
        by = f"signed by {checked.signer.name}" if checked.signer else "not signed by a trusted key"
        out.print(f"{len(checked.facts['files'])} files as exported, {by}", highlight=False)
    else:
        for problem in problems:
            err.print(f"error: {problem}", style="red", markup=False, highlight=False)
    if problems:
        raise typer.Exit(2)


def sign(ref: str, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Sign a version; of NAME@ALIAS, the alias's last move too."""
    from orchestrator import signing

    made = signing.sign(workspace_here(), ref, key)
    if as_json:
        print_json(made)
    else:
        for kind, subject in made.items():
            out.print(f"signed {kind} {subject}", highlight=False)


@keys_app.command("new")
def keys_new(name: str) -> None:
    """Draw a key that signs; it is trusted here."""
    from orchestrator.signing import keys
    from orchestrator.workspace import home_folder

    made = keys(home_folder()).new(name)
    out.print(f"{made.name}  {made.public}", highlight=False, markup=False)


@keys_app.command("list")
def keys_list(as_json: JsonFlag = False) -> None:
    """List the keys that are trusted, and the policy."""
    from dataclasses import asdict

    from orchestrator import signing
    from orchestrator.workspace import home_folder

    home = home_folder()
    found, policy = signing.keys(home).keys(), signing.policy(home)
    if as_json:
        print_json({"keys": [asdict(key) for key in found], "policy": policy})
        return
    for key in found:
        does = "signs" if key.private else "trusted"
        out.print(f"{key.name:20s} {key.id}  {does}", highlight=False, markup=False)
    out.print(f"policy: {policy}", highlight=False)


@keys_app.command("show")
def keys_show(name: str, as_json: JsonFlag = False) -> None:
    """Print a public key, to be trusted elsewhere."""
    from dataclasses import asdict

    from orchestrator.signing import keys
    from orchestrator.workspace import home_folder

    found = keys(home_folder()).key(name)
    if as_json:
        print_json(asdict(found))
    else:
        out.print(found.public, highlight=False, markup=False)


@keys_app.command("trust")
def keys_trust(name: str, public: str) -> None:
    """Trust somebody's public key, as weft keys show prints it."""
    from orchestrator.signing import keys
    from orchestrator.workspace import home_folder

    made = keys(home_folder()).trust(name, public)
    out.print(f"trusted {made.name}  {made.id}", highlight=False, markup=False)


@keys_app.command("distrust")
def keys_distrust(name: str) -> None:
    """Trust a key no more; what it signed counts as unsigned."""
    from orchestrator.signing import keys
    from orchestrator.workspace import home_folder

    keys(home_folder()).distrust(name)
    out.print(f"{name} is trusted no more", highlight=False, markup=False)


@keys_app.command("policy")
def keys_policy(
    chosen: Annotated[str, typer.Argument(help="off, warn or require")],
) -> None:
    """Say what is done about versions that no trusted key signed."""
    from orchestrator.signing import set_policy
    from orchestrator.workspace import home_folder

    out.print(f"policy: {set_policy(home_folder(), chosen)}", highlight=False)
