"""Programs of answers, run beside their tests in bubblewrap.

An answer's code and the tests never share a process: each runs in a sandbox of its own, and the tests call the answer's
functions through two pipes, by value. So the answer can neither read the tests nor change them, and an object that is
equal to everything arrives as plain data or not at all. The verdict is written by the tests' side, with a nonce that
the answer's side never sees.

A program whose output is wanted runs in one sandbox of the same kind; its output decides nothing.
"""
