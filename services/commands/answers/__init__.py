"""The work of the commands that ask for answers or judge them: `fusion sample`, `chat` and `verify`."""
