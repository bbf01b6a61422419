"""`python -m lunar_tune.models`."""

from lunar_tune.cli.main import run

if __name__ == "__main__":
    run("models")
