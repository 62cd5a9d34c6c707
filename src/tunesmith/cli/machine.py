"""What is here: models, fetch, doctor."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunesmith.cli import onward
from tunesmith.cli.console import fetched, loading, print_json, start
from tunesmith.cli.onward import go_on
from tunesmith.cli.options import JsonOption, VerboseOption, whole
from tunesmith.language import said


def models(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The models that have a short name."""
    console = start(verbose, as_json)
    from rich.table import Table

    from tunesmith import hub
    from tunesmith.screen import styled

    rows = [
        {
            "alias": a.name,
            "source": a.sources[0],
            "parameters": a.parameters,
            "licence": a.licence,
            "note": said(a.note),
        }
        for a in hub.aliases().values()
    ]
    if as_json:
        print_json({"models": rows})
        return

    def size(row: dict[str, Any]) -> str:
        count = row["parameters"]
        return f"{count / 1e9:.1f} B" if count > 0.9995e9 else f"{count / 1e6:.0f} M"

    table = Table(box=None, padding=(0, 2))
    for name in (said("alias"), said("size"), said("source"), said("licence"), said("note")):
        table.add_column(name)
    for row in rows:
        table.add_row(styled((row["alias"], "bold")), size(row), row["source"], row["licence"], row["note"])
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
    else:  # a table would cut ids
        for row in rows:
            console.print(styled((row["alias"], "bold"), f"  {size(row)}, {row['licence']}"))
            console.labelled("", styled((row["source"], "cyan")), 0)
            console.labelled("", row["note"], 0)
    console.print(
        "\n"
        + said(
            "Any model that transformers builds itself and whose tokenizer has a chat template works too: "
            "hf:org/name, ms:org/name or a folder."
        )
    )
    go_on(console, *onward.after_models(rows[0]["alias"]))


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
    found = fetched(console, model, revision, weights=True)
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    here = said("{model} is here: {folder} ({mib:,.0f} MiB)", model=model, folder=found.folder, mib=size / 2**20)
    console.print(here, soft_wrap=True)
    go_on(console, *onward.after_fetch(model))
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
    with loading(console):
        from tunesmith.cli.doctor import examine
        from tunesmith.screen import padded, styled

        findings = examine()
    for finding in findings:
        sign = ("✓", "green") if finding.ok else ("✗", "red")
        console.print(styled(sign, (f" {padded(said(finding.name), 14)}", "bold"), f" {finding.found}"))
        if finding.fix:
            console.labelled("→", styled((finding.fix, "yellow")), width=1)
    ok = all(finding.ok for finding in findings)
    if ok:
        go_on(console, *onward.after_doctor())
    if as_json:
        print_json({"ok": ok, "findings": [finding.as_dict() for finding in findings]})
    if not ok:
        raise typer.Exit(2)
