"""`python -m lunar_tune.search`."""

from lunar_tune.cli.running import command_app
from lunar_tune.cli.search import search

if __name__ == "__main__":
    command_app(search)()
