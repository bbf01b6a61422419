"""`python -m lunar_tune.layers`."""

from lunar_tune.cli.layers import layers
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(layers)()
