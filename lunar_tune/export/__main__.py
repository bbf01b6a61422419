"""`python -m lunar_tune.export`."""

from lunar_tune.cli.export import export
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(export)()
