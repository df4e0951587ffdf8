"""`fusion verify`: verdicts on the answers of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import out, print_line, user_errors


def verify(
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS.jsonl", exists=True, dir_okay=False, help="Answers, as `fusion sample --to` writes."
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPTS.jsonl", help="Prompts with their specs under `verify`; may be repeated."),
    ] = None,
    spec: Annotated[str | None, typer.Option(metavar="JSON", help="Spec of all answers that have none.")] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write the rows there, each with its verdict.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a verifier; default this process.")] = None,
    application: Annotated[str, typer.Option(help="Serve application of that verifier.")] = "verify",
    bwrap: Annotated[str | None, typer.Option(help="Path of bubblewrap, for programs run here.")] = None,
    programs_at_once: Annotated[int, typer.Option(min=1, max=256, help="Programs run here at once.")] = 2,
) -> None:
    """Judge answers by what can be checked: final answers, constraints, JSON schemas, programs with tests."""
    with user_errors():
        from rich.table import Table

        from services.commands.answers.verify import Verify
        from services.verify.config import VerifyConfig

        config = VerifyConfig(bwrap=bwrap, programs_at_once=programs_at_once)
        command = Verify(answers, against or (), spec, address, application, config)
        command.run(to)
        table = Table("source", "kind", "answers", "right", "share", "mean score")
        for (source, kind), count in sorted(command.counts.items()):
            share, score = count.right / count.answers, count.scores / count.answers
            table.add_row(source, kind, f"{count.answers:,}", f"{count.right:,}", f"{share:.3f}", f"{score:.3f}")
        out.print(table if table.row_count else "no answers")
        if to is not None:
            print_line(f"verdicts: {to}")
