"""What is here: models, fetch, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.console import fetched, print_json, start
from tunesmith.cli.options import JsonOption, VerboseOption, whole


def models(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The models that have a short name."""
    console = start(verbose, as_json)
    from rich.table import Table

    from tunesmith import hub
    from tunesmith.screen import styled

    rows = [
        {"alias": a.name, "source": a.sources[0], "parameters": a.parameters, "licence": a.licence, "note": a.note}
        for a in hub.aliases().values()
    ]
    if as_json:
        print_json({"models": rows})
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("alias", "size", "source", "licence", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            styled((row["alias"], "bold")),
            f"{row['parameters'] / 1e9:.1f} B" if row["parameters"] > 1e9 else f"{row['parameters'] / 1e6:.0f} M",
            row["source"],
            row["licence"],
            row["note"],
        )
    console.print(table)
    console.print(
        "\nAny model that transformers builds itself and whose tokenizer has a chat template works too: "
        "hf:org/name, ms:org/name or a folder."
    )


def fetch(
    model: Annotated[str, typer.Argument(help="Alias or hub id.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit.", callback=whole, show_default=False)
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring a model here; afterwards no network is needed."""
    console = start(verbose, as_json)
    from tunesmith.model import prepared

    found = prepared(fetched(console, model, revision, weights=True))
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    console.print(f"{model} is here: {found.folder} ({size / 2**20:,.0f} MiB)", soft_wrap=True)
    if as_json:
        print_json(
            {
                "model": model,
                "path": str(found.folder),
                "source": found.source,
                "bytes": size,
                "revision": found.revision,
            }
        )


def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """What this machine has and lacks, and the line that mends it."""
    console = start(verbose, as_json)
    from tunesmith.doctor import examine
    from tunesmith.screen import styled

    findings = examine()
    for finding in findings:
        sign = ("✓", "green") if finding.ok else ("✗", "red")
        console.print(styled(sign, (f" {finding.name:14}", "bold"), f" {finding.found}"))
        if finding.fix:
            console.print(f"  → {finding.fix}", style="yellow")
    ok = all(finding.ok for finding in findings)
    if as_json:
        print_json({"ok": ok, "findings": [finding.as_dict() for finding in findings]})
    if not ok:
        raise typer.Exit(2)
