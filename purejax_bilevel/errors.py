"""The one error that a user, not a programmer, has to read."""


class UserError(ValueError):
    """Bad input, told in one sentence: which field, what value, what is allowed.

    Scripts print it and exit with status 2. It is one line, whatever names and values it quotes.
    """

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.splitlines()))


class Interrupted(Exception):
    """The user asked to stop; everything up to the last chunk is kept."""
