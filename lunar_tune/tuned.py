"""`python -m lunar_tune.tuned`."""

from lunar_tune.cli.running import command_app
from lunar_tune.cli.tuned import tuned

if __name__ == "__main__":
    command_app(tuned)()
