"""What is here: models, fetch, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.console import fetched, print_json, start
from tunesmith.cli.options import JsonOption, VerboseOption


def models(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The models that have a short name."""
    console = start(verbose, as_json)
    from rich.table import Table

    from tunesmith import hub

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
            f"[bold]{row['alias']}[/]",
            f"{row['parameters'] / 1e9:.1f} B" if row["parameters"] > 1e9 else f"{row['parameters'] / 1e6:.0f} M",
            row["source"],
            row["licence"],
            row["note"],
        )
    console.print(table)
    console.print(
        "\nAny model that transformers builds itself and whose tokenizer has a chat template works too: "
        "hf:org/name, ms:org/name or a folder.",
        highlight=False,
    )


def fetch(
    model: Annotated[str, typer.Argument(help="Alias or hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring a model here; afterwards no network is needed."""
    console = start(verbose, as_json)
    from tunesmith.model import prepared

    found = prepared(fetched(console, model, revision, weights=True))
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    console.print(f"{model} is here: {found.folder} ({size / 2**20:,.0f} MiB)", highlight=False)
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

    findings = examine()
    for finding in findings:
        console.print(
            f"{'[green]✓[/]' if finding.ok else '[red]✗[/]'} [bold]{finding.name:14}[/] {finding.found}"
            + (f"\n  [yellow]→ {finding.fix}[/]" if finding.fix else ""),
            highlight=False,
        )
    ok = all(finding.ok for finding in findings)
    if as_json:
        print_json({"ok": ok, "findings": [finding.as_dict() for finding in findings]})
    if not ok:
        raise typer.Exit(2)
