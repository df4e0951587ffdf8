"""`fusion capture` and `backfill`: windows scored into the store."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import RecipeArgument, SetOption, err, print_line, read_recipe, user_errors


def capture(
    recipe: RecipeArgument,
    set_: SetOption = None,
    source: Annotated[list[str] | None, typer.Option(help="Only this source; may be repeated.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split; may be repeated.")] = None,
    windows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Windows in one file; default 256, or what was begun with.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything back instead, and name each file that is bad.")
    ] = False,
) -> None:
    """Score every window of the corpus into the store. Run again, it resumes, and repairs damaged shards."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.capture import Capture
        from services.commands.capture_scope import open_scope
        from services.commands.verify_capture import capture_problems

        scope = open_scope(read_recipe(recipe, set_), sources=source or (), splits=split or ())
        if not verify:
            Capture(scope, windows_per_shard=windows_per_shard).run(err)
            print_line(f"store: {scope.recipe.store}")
            return
        bad = 0
        for file, problem in capture_problems(scope, err):
            bad += 1
            print_line(f"{file}: {problem}")
        print_line(f"{bad} bad; `fusion capture` repairs what is missing or damaged" if bad else "all good")
    raise typer.Exit(1 if bad else 0)


def backfill(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Score into the store the windows that streams skipped, or fused without all sources."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.backfill import Backfill

        done = Backfill(read_recipe(recipe, set_)).run(err)
        print_line(f"{done.windows} windows complete, {done.answers} answers scored")
        if done.windows:
            print_line("The next epoch takes them from the store, and so does any later run on the same store.")
