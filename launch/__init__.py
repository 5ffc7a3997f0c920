"""Programs, and the runtime they share.

`flags`, `rundir`, `checkpoints`, `parallel` and `loop` know no package; each entry point knows one.
"""


class UsageError(Exception):
    """What the user asked for cannot be done: one sentence with flag, value and what is allowed.

    `flags.run` prints it on stderr and exits with status 2.
    """
