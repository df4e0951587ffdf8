"""`fusion sample` and `chat`: answers of the sources, into the store or to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from services.cli.options import RecipeArgument, SetOption, err, out, print_line, print_note, read_recipe, user_errors


def sample(
    recipe: RecipeArgument,
    set_: SetOption = None,
    source: Annotated[list[str] | None, typer.Option(help="Only this source; may be repeated.")] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Then write all answers there, as rows of a corpus.")
    ] = None,
) -> None:
    """Ask the sources for answers to the recipe's prompts. Running it again asks for what is missing only."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.answers.sample import Sample

        command = Sample(read_recipe(recipe, set_), sources=source or ())
        tallies = command.run(err)
        for name, tally in tallies.items():
            refused = f", {tally.refused} prompts refused: {tally.reason}" if tally.refused else ""
            print_line(f"{name}: {tally.sampled} answers sampled, {tally.kept} there before{refused}")
        print_line(f"store: {command.files.location('answers')}")
        if to is not None:
            print_line(f"{to}: {command.export(to)} answers")


def chat(
    recipe: RecipeArgument,
    set_: SetOption = None,
    source: Annotated[str | None, typer.Option(help="Source to talk to; needed where there are several.")] = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Say this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy, else 0.01 to 2.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Above 0 to 1.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same words with the same seed get the same answers.")] = 0,
    tools: Annotated[
        str | None, typer.Option(metavar="python", help="Run the model's Python programs in the sandbox.")
    ] = None,
    max_tool_turns: Annotated[
        int | None, typer.Option(min=1, help="Answers in a row whose programs are run; 4 by default.")
    ] = None,
) -> None:
    """Talk to a model that is served. A model without a chat template continues what you write."""
    with user_errors():
        from pydantic import ValidationError

        from services.base.settings import explain
        from services.commands.answers.chat import MAX_TOOL_TURNS, Chat
        from services.wire.answer import Sampling

        try:
            sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        except ValidationError as error:
            raise ValueError(f"--{explain(error).replace('_', '-', 1)}") from error
        if tools not in {None, "python"}:
            raise ValueError(f"--tools: {tools!r} is unknown; allowed is python")
        if max_tool_turns is not None and tools is None:
            raise ValueError("--max-tool-turns: only with --tools python")
        turns = max_tool_turns or MAX_TOOL_TURNS
        made = Chat(
            read_recipe(recipe, set_),
            source,
            system,
            sampling,
            runs_python=tools is not None,
            max_tool_turns=turns,
            show=_show,
        )
        with made as conversation:
            if once is not None:
                print_line(conversation.say(once))
                return
            print_note(f"{conversation.description}; an empty line or Ctrl-D ends")
            while words := _asked():
                out.print(conversation.say(words), soft_wrap=True)


def _show(title: str, text: str) -> None:
    """Print what happens between question and answer."""
    print_note(Text(f"{title}:", style="bold"))
    print_note(Text(text.rstrip("\n")))


def _asked() -> str:
    """Return what the user says; empty at the end."""
    try:
        return out.input("> ")
    except (EOFError, KeyboardInterrupt):
        return ""
