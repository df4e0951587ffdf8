"""The fault drill: a stream through real services, while parts are killed, frozen, cut off and made to lie.

`python -m tests.drill --seconds 600` consumes a corpus over and over with the real client, in a process of its own
that writes a ledger; see __main__.py for the options and faults.py for what is done to it. At the end every window must
stand in the ledger once per epoch, and every block must be what the sources that took part in it really said.
"""
