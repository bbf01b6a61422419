"""`python -m lunar_tune.compare`."""

from lunar_tune.cli.compare import compare
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(compare)()
