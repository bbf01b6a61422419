"""`python -m lunar_tune.cache`."""

from lunar_tune.cli.main import run

if __name__ == "__main__":
    run("cache")
