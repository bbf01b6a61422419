"""`python -m lunar_tune.ask`."""

from lunar_tune.cli.ask import ask
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(ask)()
