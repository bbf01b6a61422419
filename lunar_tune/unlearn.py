"""`python -m lunar_tune.unlearn`."""

from lunar_tune.cli.running import command_app
from lunar_tune.cli.unlearn import unlearn

if __name__ == "__main__":
    command_app(unlearn)()
