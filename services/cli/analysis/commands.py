"""`fusion headroom`, `view`, `cloze`, `export`: can fusing help, what do sources say, tasks, and rows as a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import RecipeArgument, SetOption, err, out, print_line, read_recipe, user_errors
from services.recipes.recipe import RecipeError


def headroom(
    recipe: RecipeArgument,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    windows: Annotated[int, typer.Option(min=1, help="Most windows to look at, spread evenly over the split.")] = 256,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too.")] = None,
) -> None:
    """Tell before training whether fusing can help: each source, their best mixture, the fused rows, by domain."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.base.atomic import write_whole
        from services.base.progress_bars import window_progress
        from services.cli.analysis.tables import show_headroom
        from services.commands.analysis.headroom import headroom as measure

        checked = read_recipe(recipe, set_)
        with window_progress(err) as progress:
            found = measure(checked, split, windows, progress)
        if json_ is not None:
            write_whole(json_, json.dumps(found, indent=2) + "\n")
        show_headroom(found, out)
        print_line(found["verdict"]["sentence"])


def view(
    recipe: RecipeArgument,
    set_: SetOption = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page to this file and end; a browser needs nothing else."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="This text.")] = None,
    file: Annotated[Path | None, typer.Option(help="The text in this file, UTF-8.")] = None,
    window: Annotated[int, typer.Option(min=0, help="The window at this place of the split.")] = 0,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    against: Annotated[
        Literal["min_ce", "avg_ce", "fixed", "online"] | None,
        typer.Option(help="Show a second strategy beside the recipe's; fixed weighs all sources alike."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="Candidates shown per row.")] = 5,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 0,
) -> None:
    """Show, token by token, what each source says, in its own tokens and in the target's; ctrl-C ends the page.

    The page is served on 127.0.0.1 behind a token that its address carries: choose a window there, or type a text or a
    conversation.
    """
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.analysis.serve_view import serve_view
        from services.commands.analysis.view import corpus_window, own_text, write_view
        from services.commands.prepare import corpus_and_target, prepare
        from services.web.served_page import AskedView

        if text is not None and file is not None:
            raise ValueError("--text, --file: give one of them")
        if html is not None and port:
            raise ValueError("--port: not with --html, which writes a file and serves nothing")
        checked = read_recipe(recipe, set_)
        given = file.read_bytes() if file is not None else text.encode() if text is not None else None
        passage = None if given is None else own_text(checked, given, "--text, --file")
        prepare(checked, save=False)
        corpus = corpus_and_target(checked)
        passage = passage or corpus_window(checked, corpus, split, window)
        if html is not None:
            print_line(str(write_view(checked, passage, html, against=against, top=top)))
            return
        strategies = ("recipe",) if against is None else ("recipe", against)
        asked = {"split": split, "window": window} if given is None else {"text": given.decode()}
        first = AskedView.model_validate({**asked, "strategies": strategies, "top": top})
        serve_view(checked, corpus, first, port=port, print_line=print_line)


def cloze(
    recipe: RecipeArgument,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or an empty one.")],
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    per_document: Annotated[int, typer.Option(min=1, help="Most questions of a document.")] = 4,
    seed: Annotated[int, typer.Option(help="Other words are asked for with another seed.")] = 0,
) -> None:
    """Write multiple-choice tasks (which word stood there?) from documents, for `fusion eval --tasks OUT`."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.analysis.cloze import write_cloze

        checked = read_recipe(recipe, set_)
        for name, number in write_cloze(checked, folder, split, per_document=per_document, seed=seed).items():
            print_line(f"{name}: {number} questions")


def export(
    recipe: RecipeArgument,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or an empty one.")],
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "train",
    format_: Annotated[
        Literal["transformers", "distillkit"], typer.Option("--format", help="Columns for which trainer.")
    ] = "transformers",
    length: Annotated[
        int | None, typer.Option(min=2, help="Positions of every example; needed for distillkit, and only there.")
    ] = None,
) -> None:
    """Write fused windows as a data set for Hugging Face's `datasets`, for a trainer of your own."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.base.progress_bars import window_progress
        from services.commands.export import export as write

        checked = read_recipe(recipe, set_)
        if (length is None) != (format_ == "transformers"):
            raise RecipeError("--length: needed with --format distillkit, and only there")
        with window_progress(err) as progress:
            done = write(checked, folder, split, progress, distillkit_length=length)
        for name, number in done.left_out.items():
            print_line(f"{name}: does not take {number} windows; left out")
        print_line(f"{folder}: {done.windows} windows")
