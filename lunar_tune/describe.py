"""`python -m lunar_tune.describe`."""

from lunar_tune.cli.describe import describe
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(describe)()
