"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: a flag, a file or a setting that the program cannot work with.

    Its ``str`` is one line which names the flag or file, the value, and the remedy. The process
    prints that line on one rank and ends with exit code 2; a traceback would only bury it.
    """
