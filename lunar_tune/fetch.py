"""`python -m lunar_tune.fetch`."""

from lunar_tune.cli.fetch import fetch_command
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(fetch_command)()
