"""`python -m lunar_tune.collect`."""

from lunar_tune.cli.main import run

if __name__ == "__main__":
    run("collect")
