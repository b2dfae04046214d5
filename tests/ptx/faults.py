"""The errors of the emulator."""


class Fault(Exception):
    """A program did what no GPU may do: the run ends here."""


class UnknownInstruction(Exception):
    """A program has an instruction that the emulator does not know."""
