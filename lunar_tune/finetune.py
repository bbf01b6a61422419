"""`python -m lunar_tune.finetune`."""

from lunar_tune.cli.finetune import finetune
from lunar_tune.cli.running import command_app

if __name__ == "__main__":
    command_app(finetune)()
