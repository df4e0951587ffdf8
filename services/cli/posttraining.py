"""`fusion posttrain`: stages of SFT, DPO and GRPO, each let through by a gate."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import RecipeArgument, SetOption, out, print_line, read_recipe, user_errors


def posttrain(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: Annotated[str, typer.Option(help="Folder of the chain below the recipe's.")] = "posttrain",
    force: Annotated[bool, typer.Option(help="Promote stages that the gate holds back; the report says so.")] = False,
    start_over: Annotated[bool, typer.Option(help="Forget all stages of the same run name.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Submit as a job: Ray dashboard, http://host:8265; default this machine.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="With --ray-address: submit and return at once.")] = False,
) -> None:
    """Run the chain of post-training stages. Running it again skips what is done, and resumes what is not."""
    from services.commands.posttrain.chain import run_chain, submit_chain
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        if ray_address is not None:
            code = submit_chain(
                checked,
                out,
                run_name=run_name,
                force=force,
                start_over=start_over,
                dashboard=ray_address,
                follow=not detach,
            )
            raise typer.Exit(code)
        promoted = run_chain(checked, out, run_name=run_name, force=force, start_over=start_over)
        print_line(f"promoted: {promoted}")
        print_line(f"report: {checked.training_folder(run_name) / 'posttrain.md'}")
