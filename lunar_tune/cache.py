"""`python -m lunar_tune.cache`."""

from lunar_tune.cli.cache import cache
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(cache)()
