"""The checker of the import hook: beartype, with an int passing for a float as the language has it."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
