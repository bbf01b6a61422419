"""`python -m lunar_tune.table5`."""

from lunar_tune.cli.running import command_app
from lunar_tune.cli.table5 import table5

if __name__ == "__main__":
    command_app(table5)()
