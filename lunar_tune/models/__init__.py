"""Which models there are, where their parts lie, how a question is put to them, how they load."""
