"""`python -m lunar_tune.table5`."""

from lunar_tune.cli.main import run

if __name__ == "__main__":
    run("table5")
