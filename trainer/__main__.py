"""`python -m trainer`; see `trainer.cli.main`."""

from trainer.cli.main import start

if __name__ == "__main__":
    start()
