"""What the commands do that ask for answers, or judge them: `fusion sample`, `chat` and `verify`."""
